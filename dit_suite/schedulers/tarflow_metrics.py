"""Offline metrics of the GS-Jacobi paper: which first guess suits a block (IGM) and which blocks are tough (CRM)."""

from dataclasses import dataclass

import torch

from dit_suite.models.tarflow import TarFlowModel

NORMS: dict[str, float | str] = {"2": 2, "1": 1, "fro": "fro"}


@dataclass(frozen=True)
class FlowMetrics:
    """Rows are blocks in FORWARD order (the reverse of sampling order).

    Attributes:
        igm: `(blocks, 2)`, mean error after one Jacobi step from the guess "latent" and from the guess "zero".
        crm_parts: `(blocks, 4)`: data norm A, scale-weight norm Ws, shift-weight norm Wb, and CRM = A * Ws + Wb.
    """

    igm: torch.Tensor
    crm_parts: torch.Tensor

    @property
    def crm_share(self) -> torch.Tensor:
        """`(blocks,)`, percent of the summed CRM; zeros where every CRM is zero."""
        crm = self.crm_parts[:, 3]
        return 100.0 * crm / crm.sum().clamp(min=torch.finfo(crm.dtype).tiny)

    def guesses(self) -> list[str]:
        """The better guess of every block in SAMPLING order (the paper's rule)."""
        return ["latent" if latent <= zero else "zero" for latent, zero in self.igm.flip(0).tolist()]


@torch.no_grad()
def flow_metrics(
    model: TarFlowModel, sample: torch.Tensor, class_labels: torch.Tensor | None = None, norm: str = "2"
) -> FlowMetrics:
    """IGM and CRM of every block on a batch of images (one forward pass and two more per block).

    As in the reference the batch is averaged before the norm, and the guesses are tried with the mean class vector.

    Args:
        sample: `(batch, channels, side, side)` clean images in [-1, 1].
        class_labels: labels of the forward pass, or None.
        norm: matrix norm of a (tokens, token_dim) error: "2" spectral, "1" largest column sum, "fro".
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    order = NORMS[norm]
    hidden_states, igm, crm = model.patchify(sample).float(), [], []
    for block in model.blocks:
        inputs = block.order(hidden_states)
        log_scale, shift = block.affine(inputs, class_labels)
        latents = (inputs - shift) * torch.exp(-log_scale)
        zero = torch.zeros_like(inputs)
        zero[:, 0] = inputs[:, 0]
        errors = []
        for guess in (latents, zero):
            scale, offset = block.affine(guess)
            error = (torch.exp(scale) * latents + offset - inputs).mean(dim=0)
            errors.append(torch.linalg.matrix_norm(error, ord=order))
        igm.append(torch.stack(errors))
        data = torch.linalg.matrix_norm((torch.exp(-log_scale) * inputs).mean(dim=0), ord=order)
        weight = block.proj_out.weight.float()
        shift_norm = torch.linalg.matrix_norm(weight[-block.token_dim :], ord=order)
        scale_norm = torch.zeros_like(shift_norm)
        if not block.volume_preserving:
            scale_norm = torch.linalg.matrix_norm(weight[: block.token_dim], ord=order)
        crm.append(torch.stack([data, scale_norm, shift_norm, data * scale_norm + shift_norm]))
        hidden_states = block.order(latents)
    return FlowMetrics(torch.stack(igm), torch.stack(crm))
