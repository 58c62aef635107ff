"""``python -m pallas_flash.tuning``: searches configurations on the GPU at hand."""

from pallas_flash.tuning.autotune import main

main()
