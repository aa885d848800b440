"""Switch-DiT: a DiT whose blocks route each denoising timestep through a few linear experts (arXiv 2403.09176).

A gate sees the timestep only, never the tokens or the class, and picks k of E experts for all tokens of a sample. The
mixture of experts multiplies what the block's branches read; the residual stream is untouched. Experts are linear, so
for a given timestep they collapse into one matrix (`TimestepRouter.merge`), which is how sampling runs here: once per
step where the batch is at one timestep (compiled: once per pass).

Baselines in the same class: `routing="channels"` is DTR (a fixed window of channels per timestep, no parameters) and
`routing="none"` is the plain DiT.
"""

from collections.abc import Iterable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from dit_suite.models.dit import LabelEmbedder
from dit_suite.models.dit_blocks import (
    AdaLNFinalLayer,
    AdaLNZeroBlock,
    PatchEmbed,
    TimestepEmbedder,
    init_dit_weights,
    sincos_2d,
    unpatchify,
)
from dit_suite.step_plan import current_step

ROUTINGS = ("experts", "channels", "none")
WINDOW_EXPONENT = 4.0

MergedExperts = dict[int, tuple[torch.Tensor, torch.Tensor]]


def sliding_window(num_timesteps: int, units: int, width: int, exponent: float = WINDOW_EXPONENT) -> torch.Tensor:
    """A 0/1 table `(num_timesteps, units)`: row t has `width` ones in a row that start at
    `round((t / (T - 1))^exponent * (units - width))`, so that row 0 starts at 0 and the last row ends at `units`."""
    progress = torch.arange(num_timesteps, dtype=torch.float64) / (num_timesteps - 1)
    start = (progress**exponent * (units - width)).round().long()[:, None]
    unit = torch.arange(units)[None]
    return ((unit >= start) & (unit < start + width)).float()


def select_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest values of the last dimension; ties go to the lower index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True)


def weights_key(parameters: Iterable[nn.Parameter]) -> tuple | None:
    """Changes whenever the parameters do; None where that can't be seen (offloaded, sharded or quantised ones)."""
    used = list(parameters)
    if any(type(parameter) is not nn.Parameter or parameter.is_meta for parameter in used):
        return None
    return tuple((parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in used)


def can_read(timestep: torch.Tensor) -> bool:
    """Whether values may be looked at without waiting for a device or breaking a graph."""
    return timestep.device.type == "cpu" and not torch.compiler.is_compiling()


def common_level(timestep: torch.Tensor) -> torch.Tensor:
    """One entry instead of `(batch,)` where the batch is at one level: an expanded value, which pipelines pass, or, in
    inference and where it costs nothing to look, equal values."""
    if timestep.stride() == (0,):
        return timestep[:1]
    if not torch.is_grad_enabled() and can_read(timestep) and bool((timestep == timestep[0]).all()):
        return timestep[:1]
    return timestep


class TimestepRouter(nn.Module):
    """Gate and experts of one block. Everything that uses the weights goes through `forward`, where the hooks of
    offloading and sharding bring them in.

    Args:
        hidden_size: width D.
        num_experts: E, each one linear layer D -> D; `expert_weight (E, D_in, D_out)` multiplies from the right.
        experts_per_timestep: k. The gates are the raw softmax values, so their sum over the k chosen is below 1.
    """

    def __init__(self, hidden_size: int, num_experts: int, experts_per_timestep: int):
        super().__init__()
        self.num_active = experts_per_timestep
        self.gate = nn.Linear(hidden_size, num_experts)
        self.expert_weight = nn.Parameter(torch.zeros(num_experts, hidden_size, hidden_size))
        self.expert_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(
        self, time_embedding: torch.Tensor, hidden_states: torch.Tensor | None = None, output: str = "mixture"
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Args: time embeddings `(batch, D)`; tokens `(batch, n, D)` for the mixture; `output`: "mixture" (expert by
        expert, see `mix_grouped`), "merged" (one linear layer per row, see `merge`) or "probabilities"."""
        if output == "probabilities":
            return self.probabilities(time_embedding)
        if output == "merged" and len(time_embedding) == 1 and can_read(time_embedding):
            return self.merge_chosen(self.probabilities(time_embedding)[0].tolist())
        gates = self.gates(time_embedding)
        return self.merge(gates) if output == "merged" else self.mix_grouped(hidden_states, gates)

    def probabilities(self, time_embedding: torch.Tensor) -> torch.Tensor:
        """Softmax over the experts in float32: `(batch, D)` to `(batch, E)`."""
        return self.gate(nn.functional.silu(time_embedding)).float().softmax(dim=-1)

    def selected(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Which experts are on: bool `(batch, E)` with k True per row; ties go to the lower index."""
        return select_largest(probabilities, self.num_active)

    def gates(self, time_embedding: torch.Tensor) -> torch.Tensor:
        """Probabilities of the chosen experts and zeros elsewhere: `(batch, E)`."""
        probabilities = self.probabilities(time_embedding)
        return probabilities * self.selected(probabilities.detach())

    def merge(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One linear layer per row of `gates`: weights `(batch, D, D)` and biases `(batch, D)`.

        `sum_j g_j (x W_j + b_j) = x (sum_j g_j W_j) + sum_j g_j b_j`, exact because experts are linear.
        """
        gates = gates.to(self.expert_weight.dtype)
        weight = gates @ self.expert_weight.flatten(1)
        return weight.unflatten(1, self.expert_weight.shape[1:]), gates @ self.expert_bias

    def merge_chosen(self, probabilities: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """`merge` for the probabilities of one row: `(1, D, D)` and `(1, D)`. Only the chosen experts are read; all
        of them are 21 MB at S/2."""
        chosen = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert])[: self.num_active]
        merged = []
        for experts in (self.expert_weight, self.expert_bias):
            total = experts[chosen[0]] * probabilities[chosen[0]]
            for expert in chosen[1:]:
                total.add_(experts[expert], alpha=probabilities[expert])
            merged.append(total[None])
        return merged[0], merged[1]

    def mix_grouped(self, hidden_states: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """The mixture, expert by expert on the samples that chose it: k passes a sample whatever E is. Training uses
        it, where a merged matrix per sample would be kept for the backward pass. Its shapes depend on the gates, so
        compiled training does not: there every sample has its merged matrix, `D * D` numbers a block."""
        mixed = torch.zeros_like(hidden_states)
        for expert in range(gates.shape[1]):
            rows = gates[:, expert].nonzero().squeeze(1)
            out = hidden_states[rows] @ self.expert_weight[expert] + self.expert_bias[expert]
            mixed = mixed.index_add(0, rows, (out * gates[rows, expert, None, None]).to(mixed.dtype))
        return mixed


class SwitchDiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """Switch-DiT, DTR or plain DiT, class-conditional; the interface is that of `dit_suite.models.dit.DiTModel`.

    Args:
        sample_size: side of the latent. Any grid is accepted in `forward`.
        patch_size: side of a patch.
        in_channels: latent channels C.
        num_layers, num_attention_heads, attention_head_dim: depth, heads and width per head.
        mlp_ratio: inner width of the feed-forward over the width.
        num_classes: number of classes K; 1 means unconditional and leaves no null class.
        class_dropout_prob: share of labels that training drops; 0 means no null class.
        learn_sigma: the output has 2C channels, prediction then variance.
        routing: "experts" (Switch-DiT), "channels" (DTR) or "none" (plain DiT).
        num_experts: E experts in every block.
        experts_per_timestep: k of them are on.
        num_timesteps: length of the timestep scale; DTR's table and the prior loss are indexed by it.
        channel_share: DTR's share of channels that are on.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["AdaLNZeroBlock", "TimestepRouter"]
    _repeated_blocks = ["AdaLNZeroBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "time_embed", "norm", "gate"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        routing: str = "experts",
        num_experts: int = 3,
        experts_per_timestep: int = 2,
        num_timesteps: int = 1000,
        channel_share: float = 0.8,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
        if not 1 <= experts_per_timestep <= num_experts:
            raise ValueError(f"experts_per_timestep must be between 1 and {num_experts}, got {experts_per_timestep}")
        if not 0 < channel_share <= 1:
            raise ValueError(f"channel_share must be above 0 and at most 1, got {channel_share}")
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        if num_classes == 1:
            class_dropout_prob = 0.0
            self.register_to_config(class_dropout_prob=0.0)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.time_embed = TimestepEmbedder(width)
        self.label_embed = LabelEmbedder(num_classes, width, class_dropout_prob > 0)
        self.transformer_blocks = nn.ModuleList(
            AdaLNZeroBlock(width, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.routers = nn.ModuleList()
        if routing == "experts":
            self.routers.extend(TimestepRouter(width, num_experts, experts_per_timestep) for _ in range(num_layers))
        if routing == "channels":
            table = sliding_window(num_timesteps, width, int(width * channel_share))
            self.register_buffer("channel_table", table, persistent=False)
        self.final_layer = AdaLNFinalLayer(width, patch_size * patch_size * self.out_channels)
        side = sample_size // patch_size
        self.register_buffer("pos_embed", sincos_2d(side, side, width), persistent=False)
        self.gradient_checkpointing = False
        self._merged: dict[tuple, MergedExperts] = {}
        self._merged_limit = 1
        init_dit_weights(self)

    def set_expert_cache(self, max_timesteps: int) -> None:
        """How many timesteps keep their merged experts between calls (default 1: the passes of one sampling step share
        them). A whole schedule fits where `max_timesteps` times `num_layers * D * D` weights are affordable."""
        if max_timesteps < 0:
            raise ValueError(f"max_timesteps must be at least 0, got {max_timesteps}")
        self._merged_limit = max_timesteps
        self._merged.clear()

    def routing_probabilities(self, timestep: torch.Tensor) -> torch.Tensor:
        """Gate probabilities of every block: timesteps `(batch,)` to `(batch, num_layers, E)`, differentiable."""
        embedding = self.time_embed(timestep)
        return torch.stack([router(embedding, output="probabilities") for router in self.routers], dim=1)

    @torch.no_grad()
    def routing_table(self) -> torch.Tensor:
        """Which experts are on at every timestep: bool `(num_timesteps, num_layers, E)`."""
        timesteps = torch.arange(self.config.num_timesteps, device=self.pos_embed.device)
        probabilities = self.routing_probabilities(timesteps)
        return torch.stack([r.selected(probabilities[:, i]) for i, r in enumerate(self.routers)], dim=1)

    def merged_key(self, timestep: torch.Tensor) -> tuple | None:
        """What merged experts of one timestep `(1,)` depend on; None where they can't be kept: adapters and offloaded
        weights change unseen. On a device the published step tells the timestep, which saves waiting for it."""
        parts = [part for group in (self.routers, self.time_embed) for part in group.modules()]
        if self._merged_limit == 0 or any(hasattr(part, "base_layer") for part in parts):
            return None
        weights = weights_key(parameter for part in parts for parameter in part.parameters(recurse=False))
        step = current_step()
        if weights is None or not (can_read(timestep) or step):
            return None
        kind = timestep.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (timestep.item() if can_read(timestep) else step.timestep, cast, *weights)

    def expert_plan(self, timestep: torch.Tensor, time_embedding: torch.Tensor) -> MergedExperts | None:
        """The merged experts of all layers where the batch is at one timestep, kept for later passes at it. They are
        merged in a row: between the large products of the blocks the small operations of a router take longer.
        Without a common timestep an empty dict: `mixture` merges layer by layer. None asks for the grouped path of
        training."""
        if not self.routers or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
            return None
        if len(timestep) > 1:
            return {}
        key = None if torch.compiler.is_compiling() else self.merged_key(timestep)
        if key in self._merged:
            return self._merged[key]
        if key is not None:
            while len(self._merged) >= self._merged_limit:
                self._merged.pop(next(iter(self._merged)))
        plan = {layer: router(time_embedding, output="merged") for layer, router in enumerate(self.routers)}
        if key is not None:
            self._merged[key] = plan
        return plan

    def mixture(
        self, layer: int, hidden_states: torch.Tensor, time_embedding: torch.Tensor, plan: MergedExperts | None
    ) -> torch.Tensor:
        """Output of the chosen experts of a block, `M(x) - 1` in the paper's terms: same shape as `hidden_states`.
        `time_embedding` has one row per sample, or one for all."""
        router = self.routers[layer]
        if plan is None:
            return router(time_embedding.expand(len(hidden_states), -1), hidden_states)
        weight, bias = plan[layer] if layer in plan else router(time_embedding, output="merged")
        if len(weight) == 1:
            flat = hidden_states.flatten(0, 1)
            return torch.addmm(bias[0], flat, weight[0]).reshape(hidden_states.shape)
        return torch.baddbmm(bias[:, None], hidden_states, weight)

    def run_block(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        time_embedding: torch.Tensor,
        timestep: torch.Tensor,
        plan: MergedExperts | None,
    ) -> torch.Tensor:
        """`block(x * M) + (1 - M) * x`: the branches read masked tokens, the residual keeps all of x."""
        block = self.transformer_blocks[layer]
        if self.config.routing == "none":
            return block(hidden_states, conditioning)
        if self.config.routing == "channels":
            index = timestep.long().clamp(0, self.config.num_timesteps - 1)
            kept = self.channel_table[index].to(hidden_states.dtype)[:, None] * hidden_states
            return block(kept, conditioning) + (hidden_states - kept)
        mixed = self.mixture(layer, hidden_states, time_embedding, plan)
        out = block(torch.addcmul(hidden_states, hidden_states, mixed), conditioning)
        return out.addcmul_(hidden_states, mixed, value=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the noise (and, with `learn_sigma`, the variance).

        Args:
            hidden_states: noisy latent `(batch, C, H, W)`, H and W multiples of the patch side.
            timestep: `(batch,)`, or one value for all, in [0, num_timesteps); samples of a batch may differ.
            class_labels: `(batch,)` integers in 0..K-1, or K for the null class.
            force_drop_ids: `(batch,)`, 1 replaces that label by the null class.
            return_dict: an output object or a tuple.

        Returns:
            `.sample` of shape `(batch, C or 2C, H, W)`.
        """
        patch = self.config.patch_size
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        side = self.config.sample_size // patch
        positions = self.pos_embed
        if (height, width) != (side, side):
            positions = sincos_2d(height, width, positions.shape[-1], positions.device)
        tokens = self.patch_embed(hidden_states)
        tokens = tokens + positions.to(tokens.dtype)
        timestep = common_level(timestep.reshape(-1))
        time_embedding = self.time_embed(timestep)
        plan = self.expert_plan(timestep, time_embedding)
        conditioning = time_embedding + self.label_embed(class_labels, force_drop_ids)
        conditioning = conditioning.expand(tokens.shape[0], -1)
        for layer in range(len(self.transformer_blocks)):
            arguments = (layer, tokens, conditioning, time_embedding, timestep, plan)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(self.run_block, *arguments)
            else:
                tokens = self.run_block(*arguments)
        sample = unpatchify(self.final_layer(tokens, conditioning), height, width, patch)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
