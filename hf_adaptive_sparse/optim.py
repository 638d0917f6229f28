"""SparseAdamW: AdamW in which masked weights also feel an annealed pull towards zero.

Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training" (AST, arXiv
2407.20584), annealed SR-STE. For a sparse weight W with keep k at step s, after the ordinary decoupled decay:

    M <- b1 M + (1 - b1) g                         the average sees the raw (clipped) gradient only
    U  = M + lambda_s (1 - k) W                    the pull is added after the average, so momentum does not smear it
    V <- b2 V + (1 - b2) X^2                       X = U (paper, `second_moment="update"`) or g (`"gradient"`)
    W <- W - lr / (1 - b1^s) * U / (sqrt(V / (1 - b2^s)) + eps)

    lambda_s = decay * min(1, s / decay_steps)     (times a scale per layer when decay_norm = "relative")

The published GPT-2 code negates an int32 mask bitwise, which turns the pull into a push; here `keep` is boolean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .errors import ConfigError, TrainingError
from .shards import local_rows, row_range, sums_over_shards

DECAY_NORMS = ("relative", "absolute")
SECOND_MOMENTS = ("gradient", "update")

# Temporaries of a foreach call live at the same time; more elements than this go into the next call. On a CPU they
# should stay in the cache, which makes a step 1.7 times faster; a GPU wants few, large calls.
_FOREACH_NUMEL_CPU = 2**18
_FOREACH_NUMEL = 2**26


class SparseAdamW(Optimizer):
    """AdamW for any mix of ordinary and sparse parameters; which are sparse is said with `bind`.

    Kept entries follow AdamW exactly when `second_moment="gradient"`; ordinary parameters always do (they go through
    torch's own implementation).

    Args:
        params: as for any torch optimizer.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. Weight decay acts on kept and masked weights alike.
        decay: strength of the pull on masked weights, >= 0. 0 switches it off.
        decay_norm: "relative" scales the pull of each layer by rms(sqrt(V)) / rms(W), measured every
            `scale_interval` steps, so that one value means the same for every layer and model size (a masked
            weight then loses about lr * decay / rms(W) of itself per step). "absolute" is the paper's number.
        decay_steps: the pull grows linearly up to this step, then stays. 0: constant from the first step.
        second_moment: what V averages the square of, see above. With b1 = 0.9, "update" acts on noise-dominated
            weights like a 4.4 times larger learning rate.
        scale_interval: steps between two measurements of the relative scale.
    Raises:
        ConfigError: a value out of its range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay: float = 0.0,
        decay_norm: str = "relative",
        decay_steps: int = 0,
        second_moment: str = "gradient",
        scale_interval: int = 10,
    ) -> None:
        if lr < 0.0 or eps < 0.0 or weight_decay < 0.0 or decay < 0.0 or decay_steps < 0:
            raise ConfigError(
                "lr, eps, weight_decay, decay and decay_steps are >= 0, got "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, decay={decay}, decay_steps={decay_steps}."
            )
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas are in [0, 1), got {tuple(betas)}.")
        if decay_norm not in DECAY_NORMS:
            raise ConfigError(f"unknown decay_norm {decay_norm!r}; known: {', '.join(DECAY_NORMS)}.")
        if second_moment not in SECOND_MOMENTS:
            raise ConfigError(f"unknown second_moment {second_moment!r}; known: {', '.join(SECOND_MOMENTS)}.")
        if scale_interval < 1:
            raise ConfigError(f"scale_interval is a number of steps >= 1, got {scale_interval}.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "decay_norm": decay_norm,
            "decay_steps": decay_steps,
            "second_moment": second_moment,
            "scale_interval": scale_interval,
        }
        super().__init__(params, defaults)
        self._keep_of: dict[Parameter, Tensor] = {}

    def bind(self, masks: Iterable[tuple[Parameter, Tensor]]) -> None:
        """Say which parameters are sparse. Replaces what was said before.

        Args:
            masks: (parameter [out, in], keep [out, in] bool) pairs. The optimizer reads `keep` at every step, so
                update it in place. A sharded parameter comes with its full `keep`.
        Raises:
            ConfigError: a parameter that this optimizer does not train, or a `keep` of another shape or dtype.
        """
        trained = {parameter for group in self.param_groups for parameter in group["params"]}
        bound = dict(masks)
        for parameter, keep in bound.items():
            if keep.dtype != torch.bool or keep.shape != parameter.shape:
                raise ConfigError(
                    f"keep is a bool tensor of the shape of its parameter {list(parameter.shape)}, "
                    f"got {keep.dtype} {list(keep.shape)}."
                )
            if parameter not in trained:
                raise ConfigError(
                    f"a parameter of shape {list(parameter.shape)} was bound to a mask, and this optimizer does not "
                    "train it. Make the optimizer after the model was wrapped and prepared, or bind again."
                )
        self._keep_of = bound

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            TrainingError: a bound parameter without a gradient: its mask would decay while its weight stands still.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ordinary: list[Parameter] = []
            sparse: list[Parameter] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    if parameter in self._keep_of and parameter.requires_grad:
                        raise TrainingError(
                            f"a sparse weight of shape {list(parameter.shape)} has no gradient. Call backward() before "
                            "step(); under DeepSpeed use decay_mode='backward', whose partitions hide gradients."
                        )
                    continue
                self._init_state(parameter)
                (sparse if parameter in self._keep_of else ordinary).append(parameter)
            if ordinary:
                self._step_ordinary(group, ordinary)
            for chunk in _chunks(sparse):
                self._step_sparse(group, chunk)
        return loss

    def _init_state(self, parameter: Parameter) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        # A plain number: load_state_dict casts tensors to the dtype of the parameter. Of ordinary parameters
        # too: torch.distributed.checkpoint compares with the state of an optimizer that is not bound yet.
        state.setdefault("decay_scale", 0.0)

    def _step_ordinary(self, group: dict, params: list[Parameter]) -> None:
        states = [self.state[parameter] for parameter in params]
        adamw(
            params,  # type: ignore[arg-type]
            [parameter.grad for parameter in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_sparse(self, group: dict, params: list[Parameter]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        states = [self.state[parameter] for parameter in params]
        for state in states:
            state["step"] += 1
        # One number for all of them: parameters of one group have taken the same steps unless some were frozen.
        steps = [int(state["step"].item()) for state in states]
        weights = [local_rows(parameter.detach()) for parameter in params]
        grads = [local_rows(parameter.grad) for parameter in params]  # type: ignore[arg-type]
        first = [local_rows(state["exp_avg"]) for state in states]
        second = [local_rows(state["exp_avg_sq"]) for state in states]

        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1.0 - beta1)
        update = first
        pulls = self._pulls(group, params, states, steps)
        if any(pulls):
            # where and not a product with ~keep: one pass over the weight instead of two.
            zero = weights[0].new_zeros(())
            update = [
                torch.where(self._keep_of[parameter][row_range(parameter)], zero, weight)
                for parameter, weight in zip(params, weights, strict=True)
            ]
            torch._foreach_mul_(update, pulls)
            torch._foreach_add_(update, first)
        squared = update if group["second_moment"] == "update" else grads
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, squared, squared, 1.0 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, [math.sqrt(1.0 - beta2**step) for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, update, denominators, [-lr / (1.0 - beta1**step) for step in steps])

    def _pulls(self, group: dict, params: list[Parameter], states: list[dict], steps: list[int]) -> list[float]:
        """lambda_s of every parameter, as host numbers."""
        if not group["decay"]:
            return [0.0] * len(params)
        ramps = [min(1.0, step / group["decay_steps"]) if group["decay_steps"] else 1.0 for step in steps]
        if group["decay_norm"] == "absolute":
            return [group["decay"] * ramp for ramp in ramps]
        # V is that of the step before; at the very first step it is 0 and so is the pull.
        interval = group["scale_interval"]
        due = [i for i, step in enumerate(steps) if step == 2 or (step > 2 and step % interval == 0)]
        if due:
            self._measure_scales([params[i] for i in due], [states[i] for i in due], group["betas"][1])
        return [
            group["decay"] * ramp * state["decay_scale"] for ramp, state in zip(ramps, states, strict=True)
        ]

    @staticmethod
    def _measure_scales(params: list[Parameter], states: list[dict], beta2: float) -> None:
        seconds = torch.stack(torch._foreach_norm([local_rows(state["exp_avg_sq"]) for state in states], 1))
        weights = torch.stack(torch._foreach_norm([local_rows(parameter.detach()) for parameter in params], 2))
        sums = torch.stack([seconds.double(), weights.double().square()])
        sums = sums_over_shards(sums, params[0])
        # One transfer to the host for all layers; V has seen one step less than `step` says.
        for (second, weight), state in zip(sums.T.tolist(), states, strict=True):
            second /= 1.0 - beta2 ** (state["step"].item() - 1.0)
            state["decay_scale"] = math.sqrt(second / weight) if weight > 0.0 else 0.0


def _chunks(params: list[Parameter]) -> Iterable[list[Parameter]]:
    chunk: list[Parameter] = []
    numel = 0
    for parameter in params:
        limit = _FOREACH_NUMEL_CPU if parameter.device.type == "cpu" else _FOREACH_NUMEL
        if chunk and (
            numel + parameter.numel() > limit
            or parameter.dtype != chunk[0].dtype
            or parameter.device != chunk[0].device
        ):
            yield chunk
            chunk, numel = [], 0
        chunk.append(parameter)
        numel += parameter.numel()
    if chunk:
        yield chunk
