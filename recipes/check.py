"""
Does the package work on this machine, with this launcher? The same as `accelerate launch -m trl_grpo_ext.recipe.check`.

    accelerate launch recipes/check.py
    accelerate launch recipes/check.py --checks stock resume
"""

import sys

from trl_grpo_ext.recipe.check import main

if __name__ == "__main__":
    sys.exit(main())
