# Copyright 2026 Bytedance Ltd. and/or its affiliates
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Ends a run whose TransferQueue storage has died.

TransferQueue's clients wait for a storage unit that does not answer, three times 200 seconds: shorter timeouts would
fail large transfers. A dead process is another matter, and Ray knows of it at once.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Optional

import ray
from omegaconf import DictConfig, OmegaConf

from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

__all__ = ["StorageWatch"]

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_FOR_THE_LOG = 2.0  # Ray hands on what a process prints a little later


def storage_units() -> dict[str, Any]:
    """Name -> Ray handle of the storage actors that this process has started; empty for other backends."""
    from transfer_queue import interface

    return dict((getattr(interface, "_TQ_STORAGE", None) or {}).get("SimpleStorage", {}))


def _death(call: ray.ObjectRef) -> Optional[Exception]:
    """Why the actor of the answered `call` is dead for good; None if it lives, or may be reached again."""
    try:
        ray.get(call)
    except ray.exceptions.ActorDiedError as error:
        return error
    except ray.exceptions.RayError as error:
        logger.warning("A storage unit of TransferQueue did not answer: %s", error)
    return None


class StorageWatch:
    """While the block runs, a thread looks at the storage actors; when one has died it ends the process.

    Args:
        config: the trainer's configuration; ``trainer.default_local_dir`` is where checkpoints are.
        logger: returns the trainer's logger, to be finished, or None.
    """

    def __init__(self, config: DictConfig, logger: Callable[[], Any]):
        self._trainer = config.trainer
        self._backend = OmegaConf.select(config, "transfer_queue.backend.storage_backend")
        self._logger = logger
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="storage_watch", daemon=True)

    def __enter__(self) -> "StorageWatch":
        if self._backend == "SimpleStorage" and not storage_units():
            logger.warning("TransferQueue does not show its storage units: a run whose storage dies will hang.")
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        # A call that a living actor answers; the answer may take long while the actor is busy.
        pending = {unit.__ray_ready__.remote(): (name, unit) for name, unit in storage_units().items()}
        while pending and not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            answered, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            for call in answered:
                name, unit = pending.pop(call)
                if (error := _death(call)) is not None and not self._is_over.is_set():
                    self._end(name, error)
                pending[unit.__ray_ready__.remote()] = (name, unit)

    def _end(self, name: str, error: Exception) -> None:
        folder = self._trainer.default_local_dir
        checkpoint = find_latest_ckpt_path(folder) if os.path.isdir(folder) else None
        if checkpoint is None:
            resume = "No checkpoint was written yet."
        elif self._trainer.resume_mode == "auto":
            resume = f"Start again: the run resumes from {checkpoint}."
        else:
            resume = f"The last checkpoint is {checkpoint}; trainer.resume_mode=auto resumes from it."
        print(
            f"TransferQueue's storage unit {name} has died, and the batch in it is lost: {error}\n{resume} "
            "If its process was killed for memory, give the machine more, or train on smaller batches.",
            flush=True,
        )
        try:
            if (logger := self._logger()) is not None:
                logger.finish(exit_code=1)
            time.sleep(_SECONDS_FOR_THE_LOG)
        finally:
            os._exit(1)  # the main thread may wait for the storage for minutes
