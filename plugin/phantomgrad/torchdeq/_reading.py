"""Reading the bag of options that `torchdeq.get_deq` hands over."""

from __future__ import annotations

import difflib
import gc
from typing import Any

from phantomgrad.torchdeq._options import OPTIONS, DEQOptions

_READ_ELSEWHERE = frozenset(
    (
        "norm_type",
        "norm_no_scale",
        "norm_clip",
        "norm_clip_value",
        "norm_target_norm",
        "sn_n_power_iters",
        "gamma",
        "jac_loss_weight",
        "jac_loss_freq",
        "jac_incremental",
        "sradius_mode",
    )
)
"""What `torchdeq.add_deq_args` adds for `apply_norm`, losses and the script itself."""


def read(config: dict[str, Any]) -> DEQOptions:
    """The options among `config`; an unknown name is a `TypeError`.

    Note [Names of the script]
    A script usually hands over all that its parser read, `lr` and `epochs` included. Those names are the script's own, and
    argparse has refused misspelt flags already. So in a namespace, or beside all that `add_deq_args` adds, only names within a
    typo of an option are errors; elsewhere every unknown name is.
    """
    unknown = [name for name in config if name not in OPTIONS and name not in _READ_ELSEWHERE]
    meant = {name: close[0] for name in unknown if (close := difflib.get_close_matches(name, OPTIONS, 1, 0.85))}
    if meant:
        raise TypeError(
            f"get_deq(core='phantom') has no option {_listed(meant)}: did you mean {_listed(meant.values())}? If the name is "
            "the script's own, pass get_deq a dict of its options only."
        )
    if unknown and not _is_namespace(config):
        raise TypeError(
            f"get_deq(core='phantom') has no option {_listed(unknown)}. Its options are {_listed(OPTIONS)}."
        )
    return DEQOptions(**{name: value for name, value in config.items() if name in OPTIONS})


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


def _is_namespace(config: dict[str, Any]) -> bool:
    """Whether `config` holds what torchdeq's parser read, or the attributes of an object such as `argparse.Namespace`.

    `get_deq` passes on `vars(args)` without saying whose they are, so this asks the garbage collector.
    """
    if config.keys() >= _READ_ELSEWHERE:
        return True
    return any(getattr(holder, "__dict__", None) is config for holder in gc.get_referrers(config))
