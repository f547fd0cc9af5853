"""Straightforward numpy forms of the definitions: loops over l and j, nothing shared with the package."""

import numpy as np
import torch


def curves_at(curves, t, s=None):
    """numpy values of A, a, vartheta at t, or of K, b at (t, s)."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if s is None:
        return tuple(None if c is None else c(t).numpy() for c in (curves.A, curves.a, curves.vartheta))
    s = torch.as_tensor(s, dtype=torch.float64)
    return curves.K.evaluate(t, s).numpy(), curves.b.evaluate(t, s).numpy()


def network(A, a, K, b, theta, x, phi, lifted=False):
    """Eq. (1) with nested loops; K [L, L, d, d], b [L, L, d]."""
    layers = len(A)
    states = [phi(A[0] @ x + a[0], theta[0]) if lifted else x]
    for row in range(layers):
        memory = sum(K[row, j] @ states[j] + b[row, j] for j in range(row + 1))
        states.append(phi(A[row] @ x + a[row] + memory / layers, theta[row]))
    return np.array(states)


def second_order(curves, x, phi, layers, weights="trapezoid", shift=True, lift=True):
    """The explicit second-order scheme with each of its three changes switchable."""
    tau, times = 1 / layers, np.arange(layers + 1) / layers
    A0, a0, v0 = curves_at(curves, 0.0)
    states = [phi(A0 @ x + a0, v0) if lift else x]
    for row in range(layers):
        now = times[row + 1] if shift else times[row]
        w = np.full(row + 2, tau)
        if weights == "trapezoid":
            w[0] = w[-1] = tau / 2
        else:
            w[-1] = 0
        K, b = curves_at(curves, np.full(row + 2, now), np.minimum(times[: row + 2], now))
        A, a, v = curves_at(curves, now)
        past = np.array([*states, states[-1]])
        states.append(phi(A @ x + a + np.einsum("j,jab,jb->a", w, K, past) + w @ b, v))
    return np.array(states)


def ode_solution(curves, x, phi, times, rtol=1e-12):
    """Separable K, b: Z_q' = g_q(t) x(t) with y = A x + a + sum f_m (C_mq Z_q + c_mq int g_q), by DOP853."""
    from scipy.integrate import solve_ivp

    C, c = curves.K.coefficients.numpy(), curves.b.coefficients.numpy()
    modes, rank, d, _ = C.shape

    def state(t, z):
        A, a, v = curves_at(curves, t)
        f = curves.K.left(torch.tensor(t, dtype=torch.float64)).numpy()
        Z, G = z[: rank * d].reshape(rank, d), z[rank * d :]
        y = A @ x + a + np.einsum("m,mqij,qj->i", f, C, Z) + np.einsum("m,q,mqi->i", f, G, c)
        return phi(y, v)

    def slope(t, z):
        g = curves.K.right(torch.tensor(t, dtype=torch.float64)).numpy()
        return np.concatenate([np.outer(g, state(t, z)).ravel(), g])

    start = np.zeros(rank * d + rank)
    solution = solve_ivp(slope, (0, 1), start, "DOP853", t_eval=times, rtol=rtol, atol=1e-14, max_step=0.02)
    return np.array([state(t, z) for t, z in zip(solution.t, solution.y.T, strict=True)])


def numpy_phi(phi):
    """A LayerMap as a function of numpy vectors."""
    return lambda y, v: phi(torch.tensor(y), None if v is None else torch.tensor(v)).numpy()
