"""Flow-SDE: noise on the flow's steps whose drift correction keeps the marginals of the deterministic flow.

Not in the paper: Flow-GRPO's idea (Liu et al., 2025), derived for the time convention of `vlarft.flow`. The sigma net
of Eqs. (6) and (7) adds noise without a correction, which widens the distribution of the sampled chunks.

With x_tau = (1 - tau) eps + tau a, the exact velocity is v(x, tau) = E[a - eps | x]. Since x = eps + tau (a - eps),
E[eps | x] = x - tau v. Given a, x_tau is N(tau a, (1 - tau)^2), so the score of its marginal is

    score(x, tau) = -E[x - tau a | x] / (1 - tau)^2 = -E[eps | x] / (1 - tau) = (tau v - x) / (1 - tau).

By the Fokker-Planck equation dx = f dtau + g dW has the ODE's marginals if f = v + g^2 / 2 score, for any g(tau). The
schedule is g^2 = s^2 (1 - tau) / max(tau, 1 / K), s = `strength`. With c = g^2 / (2 (1 - tau)), which is
s^2 / (2 max(tau, 1 / K)):

    mean = x + (v + c (tau v - x)) / K,    variance = g^2 / K = 2 c (1 - tau) / K.

Both ends are safe. Near tau = 0, where s^2 (1 - tau) / tau diverges, tau is held at the first step's length. At
tau -> 1 the score's 1 / (1 - tau) cancels against g^2; noise and correction of the last step, tau = 1 - 1 / K, are
finite, and tau = 1 is never the start of a step. The marginals are kept exactly as K grows. As s -> 0 this is Eq. (5).
"""

import torch
from torch import Tensor
from torch.distributions import Normal

from vlarft.nets.action_head import Condition, FlowHead, SigmaNet


def sde_transition(
    head: FlowHead,
    sigma_net: SigmaNet | None,
    x: Tensor,
    k: int | Tensor,
    cond: Condition,
    strength: float = 0.7,
) -> Normal:
    """Return the distribution of x_{k+1} given x_k, one Euler-Maruyama step; a `vlarft.flow.Transition`.

    Args:
        head: velocity net.
        sigma_net: not used; the schedule is fixed.
        x, k, cond: as `vlarft.flow.transition` takes them.
        strength: s.

    Returns:
        Normal over (B, T, A), float32; its standard deviation depends on k alone.
    """
    num_steps = head.cfg.num_steps
    k = torch.as_tensor(k, device=x.device).expand(len(x))
    tau = k.float() / num_steps  # (B,)
    velocity = head.velocity(x, tau, cond, k)
    tau = tau[:, None, None]
    c = strength**2 / (2 * tau.clamp_min(1 / num_steps))  # (B, 1, 1)
    mean = x + (velocity + c * (tau * velocity - x)) / num_steps
    sigma = (2 * c * (1 - tau) / num_steps).sqrt()
    return Normal(mean, sigma.expand_as(mean), validate_args=False)
