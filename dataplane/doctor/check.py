"""A finding, and how findings are gathered."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from ..errors import DataplaneError, PreflightError
from ..run_tool import SYSTEM_PATH

Status = Literal["ok", "warn", "fail"]
KERNEL_FIX = "apt-get install linux-image-amd64 && reboot"


class Check(NamedTuple):
    """One finding; `fix` is the exact command, "" when all is well."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def safely(name: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """Checks of which a failure is a finding too."""
    done: list[Check] = []
    try:
        for each in checks():
            done.append(each)
    except (DataplaneError, OSError) as error:
        fix = error.fix if isinstance(error, PreflightError) else ""
        done.append(Check(name, "fail", getattr(error, "reason", str(error)), fix))
    return done


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
