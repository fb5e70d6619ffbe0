"""torch.compile for local modules."""

from typing import Any

import torch
import torch._functorch.config

from localprop.errors import ConfigError
from localprop.network.loss import HeadLoss
from localprop.network.network import LocalNetwork

# The random numbers of eager code, so that a compiled run drops what an uncompiled one does.
_OPTIONS: dict[str, Any] = {"fallback_random": True}


def compile_network(net: LocalNetwork) -> None:
    """Compiles every local module and its local loss, in place and on their first call; keys and weights stay.

    Each is compiled for the exact sizes that it meets: which sizes came before must not matter, or a resumed run would
    round differently.
    """
    # All modules, and those of a finish, share the code of their forward, of which torch compiles 8 versions at most.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(net.local_modules))
    if any(module.shared for module in net.local_modules):
        # There are two backward passes through shared units. The compiler's cache may have code for them from a run
        # without reach, which overwrites in the first pass what the second needs; torch refuses to run that.
        torch._functorch.config.donated_buffer = False
    for module in net.local_modules:
        module.recompute = False  # the compiler itself chooses what to compute again
        module.recomputation = tuple("none" if own == "cheap" else own for own in module.recomputation)
        module.compile(dynamic=False, options=_OPTIONS)
        loss = module.local_loss
        loss.compile(dynamic=False, options=_OPTIONS)
        if isinstance(loss, HeadLoss) and module.gives_head:
            # Its two parts are called apart. So is the forward of the next module, before and behind what is shared.
            for part in ("judge", "rest"):
                setattr(loss, part, torch.compile(getattr(loss, part), dynamic=False, options=_OPTIONS))


def require_compiler(device: torch.device, flag: str) -> None:
    """Tries the compiler on two numbers.

    Raises:
        ConfigError: it fails; the line names `flag`.
    """
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # each backend has errors of its own, and wraps those of the tools it runs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(
            f"{flag} needs torch.compile, which fails on {device} ({lines[0][:200]}); install a C++ compiler (g++), "
            f"or leave {flag} out"
        ) from None
