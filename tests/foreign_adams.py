"""Adams that torch does not have, written from their update rules as plainly as possible, and saving what the originals save."""

import torch
from torch.optim import Optimizer


class Plain(Optimizer):
    """Calls `update` for every parameter with a gradient; no decay."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.begin(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.update(group, self.state[parameter], parameter.grad))

    def begin(self, group):
        pass

    def moments(self, group, state, gradient):
        first, second = group["betas"]
        state["exp_avg"] = first * state.get("exp_avg", 0 * gradient) + (1 - first) * gradient
        state["exp_avg_sq"] = second * state.get("exp_avg_sq", 0 * gradient) + (1 - second) * gradient**2
        return state["exp_avg"], state["exp_avg_sq"]


class FusedAdam(Plain):
    """Apex: one step count, in the group; m̂ / (√v̂ + ε), or m / (√v + ε)."""

    def __init__(self, params, *, bias_correction=True, **options):
        super().__init__(params, bias_correction=bias_correction, **options)

    def begin(self, group):
        group["step"] = group.get("step", 0) + 1

    def update(self, group, state, gradient):
        return self.after(group, *self.moments(group, state, gradient), group["step"])

    def after(self, group, m, v, step):
        if not group["bias_correction"]:
            return m / (v.sqrt() + group["eps"])
        first, second = group["betas"]
        return m / (1 - first**step) / ((v / (1 - second**step)).sqrt() + group["eps"])


class CPUAdam(FusedAdam):
    """DeepSpeed on the CPU: a step in every entry, and an amsgrad that is not used."""

    def __init__(self, params, **options):
        super().__init__(params, amsgrad=False, **options)

    def begin(self, group):
        pass

    def update(self, group, state, gradient):
        state["step"] = state.get("step", 0) + 1
        return self.after(group, *self.moments(group, state, gradient), state["step"])


class TransformersAdamW(Plain):
    """lr √(1 − β₂ᵗ)/(1 − β₁ᵗ) m / (√v + ε), or without the correction."""

    def __init__(self, params, *, correct_bias=True, **options):
        super().__init__(params, correct_bias=correct_bias, **options)

    def update(self, group, state, gradient):
        state["step"] = step = state.get("step", 0) + 1
        m, v = self.moments(group, state, gradient)
        first, second = group["betas"]
        scale = (1 - second**step) ** 0.5 / (1 - first**step) if group["correct_bias"] else 1
        return scale * m / (v.sqrt() + group["eps"])


class AdaBelief(Plain):
    """timm's: v of g − m, to which ε is added for good in every step; rectified as RAdam."""

    def __init__(self, params, **options):
        flags = {"amsgrad": False, "rectify": True, "degenerated_to_sgd": True, "decoupled_decay": True, "fixed_decay": False}
        super().__init__(params, **flags | options)

    def update(self, group, state, gradient):
        (first, second), eps = group["betas"], group["eps"]
        state["step"] = step = state.get("step", 0) + 1
        m = state["exp_avg"] = first * state.get("exp_avg", 0 * gradient) + (1 - first) * gradient
        s = second * state.get("exp_avg_var", 0 * gradient) + (1 - second) * (gradient - m) ** 2 + eps
        state["exp_avg_var"] = s
        if group["amsgrad"]:
            state["max_exp_avg_var"] = torch.maximum(state.get("max_exp_avg_var", 0 * s), s)
        m_hat = m / (1 - first**step)
        if not group["rectify"]:
            return m_hat / ((state["max_exp_avg_var"] if group["amsgrad"] else s).sqrt() / (1 - second**step) ** 0.5 + eps)
        longest = 2 / (1 - second) - 1
        length = longest - 2 * step * second**step / (1 - second**step)
        if length >= 5:
            factor = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
            return (factor * (1 - second**step)) ** 0.5 * m_hat / (s.sqrt() + eps)
        return m_hat if group["degenerated_to_sgd"] else 0 * m_hat


class Algorithm1(Plain):
    """The paper's gated Adam, saved in the format of GatedAdamW: the soft gate from the second step on."""

    def __init__(self, params, **options):
        gate = {"rho": 0.99, "gate": "soft", "alpha": 0.01, "lambda_pop": 0.5, "center": "paper", "gate_warmup": 1}
        super().__init__(params, **gate | options)

    def update(self, group, state, gradient):
        (first, second), rho = group["betas"], group["rho"]
        state["step"] = step = state.get("step", 0) + 1
        deviation = gradient - state.get("exp_avg", 0 * gradient)
        state["grad_var"] = rho * state.get("grad_var", 0 * gradient) + (1 - rho) * deviation**2
        m, v = self.moments(group, state, gradient)
        m_hat, s_hat = m / (1 - first**step), state["grad_var"] / (1 - rho**step)
        excess = (m_hat**2 - group["alpha"] * s_hat).clamp(min=0)
        gate = excess / (excess + group["lambda_pop"] * s_hat) if step > group["gate_warmup"] else torch.ones_like(m)
        self.gate = gate
        return gate * m_hat / ((v / (1 - second**step)).sqrt() + group["eps"])
