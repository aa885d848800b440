"""The one table of techniques: which model, pipeline, options and bundled checkpoint belong to a name.

Rows hold strings `module:Attribute`; nothing is imported until it is asked for.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from dit_suite.options import Options


@dataclass(frozen=True)
class Technique:
    """One row.

    Attributes:
        name: what `--pipeline` and the app call it.
        title: what people read.
        task: "text-to-image", "class-to-image", "text-to-video" or "action-to-video".
        model: the network's class.
        pipeline: the pipeline's class.
        options: the call options (a frozen dataclass whose `condition` names the per-sample input).
        bundled: name of the checkpoint that comes with the repository, or None.
        accelerations: names of the plug-ins that fit.
        aliases: diffusers pipeline classes whose folders this pipeline runs.
        also_runs: further network classes that its pipeline takes.
    """

    name: str
    title: str
    task: str
    model: str
    pipeline: str
    options: str
    bundled: str | None = None
    accelerations: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    also_runs: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        return self.model.partition(":")[2]

    @property
    def networks(self) -> dict[str, str]:
        """References of all network classes that the pipeline takes, by bare name."""
        return {reference.partition(":")[2]: reference for reference in (self.model, *self.also_runs)}

    @property
    def pipeline_name(self) -> str:
        return self.pipeline.partition(":")[2]

    def model_class(self) -> type:
        return resolve(self.model)

    def pipeline_class(self) -> type:
        return resolve(self.pipeline)

    def options_class(self) -> type[Options]:
        return resolve(self.options)


@dataclass(frozen=True)
class Acceleration:
    """A plug-in: `apply(pipe, config)` returns a reversible handle."""

    name: str
    title: str
    config: str
    apply: str

    def config_class(self) -> type[Options]:
        return resolve(self.config)

    def apply_to(self, pipe: Any, config: Options) -> Any:
        return resolve(self.apply)(pipe, config)


def resolve(reference: str) -> Any:
    """Imports `module:Attribute`."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolve_named(reference: str) -> Any:
    """`resolve` for a reference that a user wrote.

    Raises:
        ValueError: there is no such module, or no such name in it.
    """
    try:
        return resolve(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{reference!r} can't be imported: {error}") from None


TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        name="pixart",
        title="PixArt (text to image)",
        task="text-to-image",
        model="diffusers:PixArtTransformer2DModel",
        pipeline="dit_suite.pipelines.pipeline_text_to_image:TextToImagePipeline",
        options="dit_suite.call_options:TextToImageOptions",
        bundled="emoji-pixart-64",
        accelerations=("bac",),
        aliases=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        also_runs=("dit_suite.grafting.models:GraftedPixArtTransformer2DModel",),
    ),
    Technique(
        name="dit",
        title="DiT (class to image)",
        task="class-to-image",
        model="dit_suite.models.dit:DiTModel",
        pipeline="dit_suite.pipelines.pipeline_class_to_image:ClassToImagePipeline",
        options="dit_suite.call_options:ClassToImageOptions",
        bundled="emoji-dit-32",
        accelerations=("bac",),
        aliases=("DiTPipeline",),
        also_runs=(
            "diffusers:DiTTransformer2DModel",
            "diffusers:Transformer2DModel",
            "dit_suite.grafting.models:GraftedDiTModel",
        ),
    ),
    Technique(
        name="tarflow",
        title="TarFlow + GS-Jacobi (class to image)",
        task="class-to-image",
        model="dit_suite.models.tarflow:TarFlowModel",
        pipeline="dit_suite.pipelines.pipeline_tarflow:TarFlowPipeline",
        options="dit_suite.call_options:TarFlowOptions",
        bundled="emoji-tarflow-64",
    ),
    Technique(
        name="wan",
        title="Wan (text to video)",
        task="text-to-video",
        model="diffusers:WanTransformer3DModel",
        pipeline="dit_suite.pipelines.pipeline_text_to_video:TextToVideoPipeline",
        options="dit_suite.call_options:TextToVideoOptions",
        bundled="emoji-wan-16x64",
        accelerations=("bac", "adaspa", "vmoba"),
        aliases=("WanPipeline",),
    ),
    Technique(
        name="acdit",
        title="ACDiT (class to image, block by block)",
        task="class-to-image",
        model="dit_suite.models.acdit:ACDiTTransformer3DModel",
        pipeline="dit_suite.pipelines.pipeline_acdit:ACDiTPipeline",
        options="dit_suite.call_options:ACDiTOptions",
        bundled="emoji-acdit-64",
        accelerations=("bac",),
    ),
    Technique(
        name="nfd",
        title="Next-Frame Diffusion (playable)",
        task="action-to-video",
        model="dit_suite.models.nfd:NFDTransformer3DModel",
        pipeline="dit_suite.pipelines.pipeline_nfd:NFDPipeline",
        options="dit_suite.call_options:NFDOptions",
        bundled="moving-square-nfd",
        accelerations=("bac",),
    ),
    Technique(
        name="pt_dit",
        title="PT-DiT (text to image, proxy tokens)",
        task="text-to-image",
        model="dit_suite.models.pt_dit:PTDiTTransformer3DModel",
        pipeline="dit_suite.pipelines.pipeline_text_to_image:TextToImagePipeline",
        options="dit_suite.call_options:PTDiTOptions",
        bundled="emoji-ptdit-64",
        accelerations=("bac",),
    ),
    Technique(
        name="switch_dit",
        title="Switch-DiT (class to image, timestep experts)",
        task="class-to-image",
        model="dit_suite.models.switch_dit:SwitchDiTTransformer2DModel",
        pipeline="dit_suite.pipelines.pipeline_class_to_image:ClassToImagePipeline",
        options="dit_suite.call_options:ClassToImageOptions",
        bundled="emoji-switchdit-64",
        accelerations=("bac",),
    ),
    Technique(
        name="lego",
        title="LEGO bricks (class to image)",
        task="class-to-image",
        model="dit_suite.models.lego:LegoTransformer2DModel",
        pipeline="dit_suite.pipelines.pipeline_lego:LegoPipeline",
        options="dit_suite.call_options:LegoOptions",
        bundled="emoji-lego-64",
    ),
)

ACCELERATIONS: tuple[Acceleration, ...] = (
    Acceleration(
        name="bac",
        title="BAC caching",
        config="dit_suite.caching.plan:BACConfig",
        apply="dit_suite.caching.bac:apply_bac",
    ),
    Acceleration(
        name="adaspa",
        title="AdaSpa sparse attention",
        config="dit_suite.attention.adaspa:AdaSpaConfig",
        apply="dit_suite.attention.plugin:apply_adaspa",
    ),
    Acceleration(
        name="vmoba",
        title="VMoBA sparse attention",
        config="dit_suite.attention.vmoba:VMoBAConfig",
        apply="dit_suite.attention.plugin:apply_vmoba",
    ),
)


def technique(name: str) -> Technique:
    """The row called `name`; `ValueError` lists the names when there is none."""
    for row in TECHNIQUES:
        if row.name == name:
            return row
    raise ValueError(f"there is no technique {name!r}; the names are {', '.join(row.name for row in TECHNIQUES)}")


def technique_of_class(class_name: str, model_class_name: str | None = None) -> Technique:
    """The row whose pipeline, or an alias of it, is `class_name`.

    Several techniques may share a pipeline; `model_class_name` (as recorded for the transformer) picks among them.

    Raises:
        ValueError: no row has that pipeline, or none of them takes that network.
    """
    rows = [row for row in TECHNIQUES if class_name == row.pipeline_name or class_name in row.aliases]
    if not rows:
        known = sorted({row.pipeline_name for row in TECHNIQUES} | {a for row in TECHNIQUES for a in row.aliases})
        raise ValueError(f"{class_name!r} is not a pipeline of this suite; it opens {', '.join(known)}")
    if model_class_name is None:
        return rows[0]
    for row in rows:
        if row.model_name == model_class_name:
            return row
    for row in rows:
        if model_class_name in row.networks:
            return row
    known = sorted({name for row in rows for name in row.networks})
    raise ValueError(f"{class_name} does not run a {model_class_name}; it takes {', '.join(known)}")


def acceleration(name: str) -> Acceleration:
    """The plug-in called `name`; `ValueError` lists the names when there is none."""
    for row in ACCELERATIONS:
        if row.name == name:
            return row
    names = ", ".join(row.name for row in ACCELERATIONS) or "none"
    raise ValueError(f"there is no acceleration {name!r}; the names are {names}")
