"""The peers that `bench.compare` measures fastmeta against, one file each.

A peer's library is imported by its forms alone, so that one can be listed without being installed.
"""

from __future__ import annotations

from bench.peers import (
    compiled,
    fastmeta_step,
    functional,
    higher,
    jax_dual,
    jax_jit,
    learn2learn,
    plain,
    supervised,
    torchmeta,
    torchopt,
)

PEERS = {
    peer.name: peer
    for peer in (
        plain.PEER,
        learn2learn.PEER,
        higher.PEER,
        torchopt.PEER,
        torchmeta.PEER,
        functional.PEER,
        compiled.PEER,
        jax_jit.PEER,
        fastmeta_step.AUTO,
        fastmeta_step.FUSED,
        supervised.PEER,
        jax_dual.PEER,
    )
}
