"""How the server runs: address, limits, and the rule that a public address is protected."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from dit_suite.options import Options, option


@dataclass(frozen=True)
class Limits(Options):
    """What one request may ask for, enforced by the server whatever the page shows."""

    max_steps: int = option(200, "denoising steps", minimum=1)
    max_count: int = option(16, "pictures or clips per request", minimum=1)
    max_side: int = option(1024, "pixels per side", minimum=8)
    max_frames: int = option(64, "frames per clip", minimum=1)
    max_prompt: int = option(1000, "characters of a prompt", minimum=1)
    max_queue: int = option(64, "requests that may wait", minimum=1)

    @property
    def of_options(self) -> dict[str, int]:
        """The most that a call option may be, by its name."""
        return {
            "num_inference_steps": self.max_steps,
            "height": self.max_side,
            "width": self.max_side,
            "num_frames": self.max_frames,
        }


PUBLIC_LIMITS = Limits(max_steps=50, max_count=4, max_side=256, max_frames=16, max_prompt=300, max_queue=20)


@dataclass(frozen=True)
class ServerSettings:
    """Everything that `app.py` decides before the page is built.

    Attributes:
        output: folder for what is made.
        host, port: address to bind.
        share: ask Gradio for a public link.
        public: open to strangers; tightens the limits and hides the history.
        auth: user name and password, or None.
        models: extra checkpoints offered beside the bundled ones.
        device: torch device of all models.
    """

    output: Path
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    public: bool = False
    auth: tuple[str, str] | None = None
    models: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.share or not is_loopback(self.host)) and self.auth is None and not self.public:
            where = "--share" if self.share else f"--host {self.host}"
            raise ValueError(
                f"{where} lets others in: add --auth USER:PASSWORD, or --public for an open, limited server"
            )

    @property
    def limits(self) -> Limits:
        return PUBLIC_LIMITS if self.public else Limits()


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """`user:password` (or the environment's DIT_SUITE_AUTH) as a pair.

    Raises:
        ValueError: no colon, or an empty half.
    """
    text = text or os.environ.get("DIT_SUITE_AUTH")
    if not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ValueError("auth must have the form USER:PASSWORD")
    return user, password
