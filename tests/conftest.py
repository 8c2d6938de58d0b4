import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "on_policy_distillation"))

# VERL chooses its platform when it is first imported; the tests run where there may be no accelerator.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "verl.plugin.cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
