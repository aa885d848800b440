# The web page in a container:  docker build -t dit-suite . && docker run -p 7860:7860 dit-suite
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home user
USER user
WORKDIR /home/user/app
COPY --chown=user requirements.txt Makefile ./
COPY --chown=user tests/requirements.txt tests/requirements.txt
RUN make setup
COPY --chown=user . .
EXPOSE 7860
CMD [".venv/bin/python", "app.py", "--host", "0.0.0.0", "--port", "7860", "--public"]
