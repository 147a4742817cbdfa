"""The cuSPARSELt library that torch itself depends on, loaded with ctypes: prototypes, status check, opaque structs.

Names, argument types and struct sizes are those of cusparseLt.h, 0.7 to 0.8.1.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import pathlib
from typing import Any

_FILE = "libcusparseLt.so.0"
_OLDEST = (0, 7, 0)

_STRUCT_BYTES = 512
ALIGNMENT = 16

# One letter an argument; every function but GetErrorString returns a status.
_LETTERS = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,  # enumerations too
    "u": ctypes.c_uint32,
    "l": ctypes.c_int64,
    "z": ctypes.c_size_t,
}
_PROTOTYPES = {
    "GetProperty": "ip",
    "Init": "p",
    "StructuredDescriptorInit": "ppllluiii",
    "DenseDescriptorInit": "ppllluii",
    "MatDescriptorDestroy": "p",
    "SpMMACompressedSize2": "pppp",
    "SpMMACompress2": "ppiipppp",
    "MatmulDescriptorInit": "ppiippppi",
    "MatmulDescSetAttribute": "ppipz",
    "MatmulAlgSelectionInit": "pppi",
    "MatmulAlgSelectionDestroy": "p",
    "MatmulAlgSetAttribute": "ppipz",
    "MatmulAlgGetAttribute": "ppipz",
    "MatmulPlanInit": "pppp",
    "MatmulPlanDestroy": "p",
    "MatmulGetWorkspace": "ppp",
    "Matmul": "ppppppppppi",
}


@functools.cache
def _library() -> tuple[Any, tuple[int, int, int]]:
    """The library and its version. RuntimeError if it is missing or too old."""
    library = _load()
    for name, letters in _PROTOTYPES.items():
        found = getattr(library, f"cusparseLt{name}")
        found.argtypes, found.restype = [_LETTERS[letter] for letter in letters], ctypes.c_int
    library.cusparseLtGetErrorString.argtypes = [ctypes.c_int]
    library.cusparseLtGetErrorString.restype = ctypes.c_char_p
    numbers = (ctypes.c_int * 3)()
    for part in range(3):
        # Without `check`, which needs this very library; the call cannot fail for these three parts.
        library.cusparseLtGetProperty(part, ctypes.addressof(numbers) + 4 * part)
    version = (numbers[0], numbers[1], numbers[2])
    if version < _OLDEST:
        raise RuntimeError(
            f"cuSPARSELt {'.'.join(map(str, version))} is older than {'.'.join(map(str, _OLDEST))}: update the wheel "
            "nvidia-cusparselt-cu13 (or -cu12)"
        )
    return library, version


def _load() -> ctypes.CDLL:
    # By its bare name it is found where torch has loaded it already, or the system knows it; else in its wheel.
    places = [_FILE]
    for package in ("nvidia", "cusparselt"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            places += map(str, pathlib.Path(folder).glob(f"**/lib/{_FILE}"))
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise RuntimeError(
        f"{_FILE} was not found: install the wheel nvidia-cusparselt-cu13 (or -cu12), on which torch's own depends"
    )


def version() -> tuple[int, int, int]:
    """Return (major, minor, patch) of the library. RuntimeError if it is missing or too old."""
    return _library()[1]


def function(name: str) -> Any:
    """Return the C function cusparseLt<name>. RuntimeError if the library is missing or too old."""
    return getattr(_library()[0], f"cusparseLt{name}")


def check(status: int, name: str, about: object) -> None:
    """Raise RuntimeError for a status that is not success. about: what the call was for, shapes and all."""
    if status:
        text = function("GetErrorString")(status).decode()
        raise RuntimeError(f"cusparseLt{name} returned status {status} ({text}) for {about}")


def call(name: str, about: object, *arguments: object) -> None:
    """Call a function and check its status."""
    check(function(name)(*arguments), name, about)


def new_struct() -> tuple[Any, int]:
    """Return memory for an opaque struct, to be kept alive, and the struct's address."""
    memory = ctypes.create_string_buffer(_STRUCT_BYTES + ALIGNMENT)
    return memory, -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
