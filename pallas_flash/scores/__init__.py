"""Score modifications: one file each, joined by `Chain`."""

from pallas_flash.scores.bias import Bias
from pallas_flash.scores.score_mod import Chain, ScoreMod
from pallas_flash.scores.softcap import Softcap

__all__ = ["Bias", "Chain", "ScoreMod", "Softcap"]
