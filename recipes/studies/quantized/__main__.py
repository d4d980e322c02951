"""All parts of the study of quantized rollouts: run what is missing, store it, print the tables, draw the picture.

python -m recipes.studies.quantized [--report]
"""

import runpy
import sys

PARTS = ("orders", "order_flips", "order_flips_controls", "estimates", "orders_trained", "int4_orders")
PARTS += ("int4_orders_controls", "low_bits", "low_bits_tuned", "estimates_trained")
PICTURE = "readme"  # of the stored results

if __name__ == "__main__":
    given = sys.argv[1:]
    for name in PARTS if "--report" in given else (*PARTS, PICTURE):
        print(f"\n{name}\n", flush=True)
        sys.argv[1:] = given
        runpy.run_module(f"recipes.studies.quantized.{name}", run_name="__main__", alter_sys=True)
