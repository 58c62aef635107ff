"""Score modifications: one file each, joined by `Chain`."""

from pallas_flash.scores.alibi import Alibi, alibi_slopes
from pallas_flash.scores.bias import Bias
from pallas_flash.scores.distance_bias import DistanceBias
from pallas_flash.scores.relative_bias import RelativeBias
from pallas_flash.scores.score_function import ScoreFunction
from pallas_flash.scores.score_mod import Chain, ScoreMod
from pallas_flash.scores.sink import Sink, split_sinks
from pallas_flash.scores.softcap import Softcap

__all__ = [
    "Alibi",
    "Bias",
    "Chain",
    "DistanceBias",
    "RelativeBias",
    "ScoreFunction",
    "ScoreMod",
    "Sink",
    "Softcap",
    "alibi_slopes",
    "split_sinks",
]
