"""What metrics are called: which may be asked for, and under which name a result is written.

Only features of the standard Inception network give a `fid`; with other features the same formula is `fd_<features>`.
"""

import re
from dataclasses import dataclass

from dit_suite.evaluation.feature_extractor import FeatureExtractor

SET_METRICS = ("fd", "sfd", "is", "kid", "precision", "recall", "density", "coverage", "mmd")
PAIR_METRICS = ("psnr", "ssim", "perceptual", "lpips")
ALIASES = {"fid": "fd", "fvd": "fd", "sfid": "sfd", "cmmd": "mmd", "inception_score": "is"}
INCEPTION_NAMES = {"fd": "fid", "sfd": "sfid", "is": "inception_score"}
CMMD_TAG = ("clip", 336, 768)


@dataclass(frozen=True)
class Request:
    """One metric that was asked for: its kind, the word used, and the sample count in that word (`fid50k`), if any."""

    kind: str
    asked: str
    count: int | None = None


def parse_metrics(text: str) -> tuple[Request, ...]:
    """Reads `fid,kid,psnr` or `fid50k`; `ValueError` lists the names for an unknown one."""
    requests = []
    for word in filter(None, (part.strip().lower() for part in text.replace(" ", ",").split(","))):
        match = re.fullmatch(r"([a-z_]+?)(\d+k?)?", word)
        stem = match[1] if match else word
        kind = ALIASES.get(stem, stem)
        if kind not in SET_METRICS + PAIR_METRICS:
            known = ", ".join((*SET_METRICS, *PAIR_METRICS, *ALIASES))
            raise ValueError(f"there is no metric {word!r}; choose from {known}")
        digits = match[2] if match else None
        count = int(digits.rstrip("k")) * (1000 if digits.endswith("k") else 1) if digits else None
        if kind not in {request.kind for request in requests}:
            requests.append(Request(kind, stem, count))
    if not requests:
        raise ValueError("ask for at least one metric")
    return tuple(requests)


def result_name(kind: str, extractor: FeatureExtractor) -> str:
    """The name a result carries: `fid`, `fvd` and `cmmd` for their own networks only, else `<kind>_<features>`."""
    tag = extractor.tag
    if extractor.is_inception:
        return INCEPTION_NAMES.get(kind, kind)
    if extractor.takes_clips and kind == "fd":
        return "fvd"
    if kind == "mmd" and (tag.name, tag.input_size, tag.dimension) == CMMD_TAG:
        return "cmmd"
    if kind == "perceptual":
        return "perceptual_enet_lite0"
    return kind if kind in PAIR_METRICS else f"{kind}_{extractor.suffix}"
