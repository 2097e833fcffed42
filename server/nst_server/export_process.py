"""The process that makes one export and ends. It imports torch, on the CPU, and gives way to everything else.

It is killed when nobody wants its file any more, and ends by itself when the front is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from nst_model import (
    FeatureModel,
    NstModelError,
    Precision,
    WeightsCorrupt,
    WeightsUnavailable,
    export,
    load_weights,
    prepare_style,
)
from nst_server.errors import Internal, ModelNotFetched, RequestError, StorageDamaged
from nst_server.messages import Exported, ExportTask, ModelExport, NotExported, StyleExport
from nst_server.storage.faults import refused
from nst_server.worker import style_of

PRIORITY = 10
"""How far behind everything else, as `nice` counts."""


def main(connection: Connection, threads: int) -> None:
    """Receive a task and where its file goes, make it, and say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front's affair
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(PRIORITY)
    if threads:
        torch.set_num_threads(threads)
    task, path = connection.recv()
    threading.Thread(target=_end_with, args=(connection,), daemon=True, name="front").start()
    connection.send(exported(task, path))


def exported(task: ExportTask, path: Path) -> Exported | NotExported:
    """Make a file; whatever goes wrong is an answer too."""
    try:
        data = _made(task)
        with refused(f"the folder {path.parent}"):
            path.write_bytes(data)  # not settled on the disk: it is checked by its hash when it is read
        return Exported(hashlib.sha256(data).hexdigest(), len(data))
    except RequestError as error:
        return NotExported(error.reason, str(error))
    except WeightsUnavailable as error:
        return NotExported(ModelNotFetched.reason, str(error))
    except WeightsCorrupt as error:
        return NotExported(StorageDamaged.reason, str(error))
    except NstModelError as error:
        return NotExported(Internal.reason, str(error))
    except Exception as error:
        traceback.print_exc()
        return NotExported(Internal.reason, f"{type(error).__name__}: {error}")


def _made(task: ExportTask) -> bytes:
    match task:
        case ModelExport(spec, weights):
            return export(load_weights(spec.model, weights), spec)
        case StyleExport():
            model = FeatureModel(load_weights(task.model, task.weights), "cpu")
            options = dataclasses.replace(task.options, precision=Precision.FP32)
            styles = [style_of(image) for image in task.images]
            return prepare_style(model, styles, options, display_name=task.display_name).to_bytes()


def _end_with(connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        connection.recv()  # the front says nothing more
    os._exit(0)
