"""Makes a tokenizer.json of a SentencePiece model, the file tokenizer.model, with transformers' own converter.

The converter runs in a process of its own: transformers imports torch, and the file comes from others. The process also
encodes some texts with the sentencepiece library and refuses a conversion that gives other ids. No text begins with a
space: there transformers' tokenizers give other ids than sentencepiece, and an engine gives transformers'. The packages
are those of the extra `sentencepiece`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from export.checkpoint.file_table import TOKENIZER_FILE
from export.errors import CheckpointError, named
from export.files.reading import is_regular, read_text

MODEL_FILE = "tokenizer.model"
EXTRA = "sentencepiece"
_PACKAGES = ("transformers", "sentencepiece")
_SECONDS = 300
_MOST_BYTES = 128 << 20
_PROGRAM = """
import os
import sys
from sentencepiece import SentencePieceProcessor

folder, model, output = sys.argv[1:]
texts = [
    "a", "two  spaces ", "The quick brown fox, 1234567890!", "def f(x):\\n\\treturn x ** 2  # ok\\n",
    "naïve café, über die Brücke", "Привет, мир", "你好，世界", "こんにちは", "مرحبا", "😀 🚀", "a\\u00a0b\\u200bc", "",
]
expected = SentencePieceProcessor(model_file=model).encode(texts)
from transformers import AutoTokenizer  # after it: with torch's libraries loaded sentencepiece may crash

converted = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
for text, theirs in zip(texts, expected, strict=True):
    ours = converted.encode(text, add_special_tokens=False)
    if ours != theirs:
        sys.exit(f"transformers' conversion encodes {text!r} as {ours[:8]}, sentencepiece as {theirs[:8]}")
with open(output, "w", encoding="utf-8") as file:
    file.write(converted.backend_tokenizer.to_str())
sys.stderr.flush()
os._exit(0)  # both libraries together may also crash as they are taken down
"""


def converted_text(folder: Path) -> str | None:
    """The text of a tokenizer.json made of a folder's tokenizer.model; None if there is no such file. Raises
    CheckpointError if the packages are not installed, and if the file cannot be converted."""
    path = folder / MODEL_FILE
    if not is_regular(path):
        return None
    where = f"loading the tokenizer of {named(folder)}"
    absent = [package for package in _PACKAGES if find_spec(package) is None]
    if absent:
        raise CheckpointError(
            f"{where}: it has {MODEL_FILE} and no {TOKENIZER_FILE}, and {' and '.join(absent)}, which convert it, are "
            f"not installed here; run: pip install 'moeship[{EXTRA}]', or where they are installed: python -c \"from "
            "transformers import AutoTokenizer as T; T.from_pretrained('FOLDER').save_pretrained('FOLDER')\""
        )
    found = path.stat()
    return _converted(folder.absolute(), where, (found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=4)
def _converted(folder: Path, where: str, _state: tuple[int, int]) -> str:
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / TOKENIZER_FILE
        command = [sys.executable, "-c", _PROGRAM, str(folder), str(folder / MODEL_FILE), str(output)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        try:
            ended = subprocess.run(
                command, env=offline, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"{where}: converting {MODEL_FILE} took more than {_SECONDS} s") from error
        if ended.returncode or not output.exists():
            reason = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
            raise CheckpointError(
                f"{where}: {MODEL_FILE} cannot be converted ({named(reason, 400)}); put the model's own "
                f"{TOKENIZER_FILE} beside it"
            )
        return read_text(output, "the converted tokenizer", most=_MOST_BYTES, error=CheckpointError)
