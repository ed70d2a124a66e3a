"""Encoded datasets on the disk: made once, mapped ever after, so that they need not fit in memory.

An entry is a folder named after everything that its tokens depend on: the content of the files, the
tokenizer, the template, the limits, and this program's own code for reading and encoding. So a
change of any of them makes another entry, and an entry is never wrong, only unused.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from ardor.data.choices import OverLength, Preferences
from ardor.data.dataset import Census, Dataset, Progress
from ardor.data.lengths import policy_of
from ardor.data.mixture import Mixture
from ardor.data.preferences import Judged, Kind, build_judged
from ardor.data.room import ABOUT, STREAM, make_room, room
from ardor.data.store import FileStore, MemoryStore, Store, checksums, mapped
from ardor.errors import CheckpointError, DataError
from ardor.files.atomic import atomic_directory, clean_partials
from ardor.files.json import read_json, write_json
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.tokenizer import Tokenizer

SMALL = 1 << 20  # bytes of data below which encoding takes no time worth a file
VARIABLE = "ARDOR_CACHE"  # names the folder, in place of the one below


class Encoding(NamedTuple):
    dataset: Dataset
    note: str | None = None  # for people: where the tokens are kept


def cache_folder() -> Path:
    """Where entries are kept: $ARDOR_CACHE/tokens, else in the user's folder of caches."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser() / "tokens"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ardor" / "tokens"


def encode(
    rows: Mixture,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    *,
    max_length: int | None = None,
    over_length: OverLength = "drop",
    preferences: Preferences = "refuse",
    vocab: int | None = None,
    train_on: TrainOn = "all",
    progress: Progress | None = None,
    cache: bool = True,
) -> Encoding:
    """`Dataset.build`, out of the cache if it is there, and else into it.

    Without `cache` the tokens are in memory, as are those of less than SMALL bytes of data. Of what
    cannot be told from other data, such as a stream, the tokens go to files that nobody else sees.
    If an entry cannot be written, as on a full disk, they are in memory too, and the note says so.

    Raises: DataError as `Dataset.build`; OSError if a disk has no room for those of a stream.
    """
    options = {
        "max_length": max_length,
        "over_length": policy_of(over_length),
        "preferences": preferences,
        "vocab": vocab,
        "train_on": train_on,
    }

    def build(store: Store) -> Dataset:
        return Dataset.build(rows, tokenizer, template, progress=progress, store=store, **options)

    return _encoded(rows, (tokenizer, template, options), build, Dataset, cache)


def encode_judged(
    rows: Mixture,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    kind: Kind,
    *,
    max_length: int,
    over_length: OverLength = "truncate_left",
    vocab: int | None = None,
    progress: Progress | None = None,
    cache: bool = True,
) -> Encoding:
    """`build_judged`, out of the cache as in `encode`.

    Raises: as `encode`.
    """
    options = {"max_length": max_length, "over_length": policy_of(over_length), "vocab": vocab}

    def build(store: Store) -> Dataset:
        return build_judged(
            rows, tokenizer, template, kind, progress=progress, store=store, **options
        )

    settings = tokenizer, template, options | {"judged": kind}
    return _encoded(rows, settings, build, Judged, cache)


def _encoded(
    rows: Mixture,
    settings: tuple[Tokenizer, ChatTemplate | None, dict[str, Any]],
    build: Callable[[Store], Dataset],
    form: type[Dataset],
    cache: bool,
) -> Encoding:
    def into(folder: Path) -> Dataset:
        store = FileStore(folder, form.dtypes)
        try:
            return build(store)
        finally:
            store.close()

    size = rows.bytes
    if not cache or (size is not None and size < SMALL):
        return Encoding(build(MemoryStore(form.dtypes)))
    root, most = cache_folder(), room()
    if not _writable(root):
        note = f"tokens are in memory: {root} cannot be written to"
        return Encoding(build(MemoryStore(form.dtypes)), note)
    identity = rows.identity()
    if identity is None:
        with tempfile.TemporaryDirectory(dir=root, prefix=STREAM) as folder:
            # The files stay readable to this process when the folder is gone.
            return Encoding(into(Path(folder)))
    try:
        found = _kept(root / _key(identity, *settings), into, form)
    except CheckpointError as error:
        note = (
            f"tokens are in memory, and will be made again next time: {error}; or name another "
            f"folder in {VARIABLE}"
        )
        return Encoding(build(MemoryStore(form.dtypes)), note)
    return found._replace(note=f"{found.note}; {make_room(root, most)}")


def _kept(place: Path, build: Callable[[Path], Dataset], form: type[Dataset]) -> Encoding:
    """The entry at `place`, made if it is not there."""
    if (found := _read(place, form)) is not None:
        return Encoding(found, f"tokens: as encoded before, in {place}")
    clean_partials(place.parent)
    try:
        with atomic_directory(place) as folder:
            made = build(folder)
            _describe(folder, made)
    except CheckpointError:
        # Another process may have put the same entry in place at the same moment.
        if (found := _read(place, form)) is None:
            raise
        return Encoding(found, f"tokens: as encoded before, in {place}")
    return Encoding(made, f"tokens: kept in {place}")


def _writable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _key(
    identity: list[list[str]],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    options: dict[str, Any],
) -> str:
    chat = None
    if template is not None:
        today = template.clock().date().isoformat() if template.dated else None
        chat = [template.fingerprint, template.tokens, today]
    parts = [identity, tokenizer.fingerprint, chat, options, _code(), tokenizers.__version__]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _code() -> str:
    """A hash of the modules that make tokens of files."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("data/*.py"), *package.glob("text/*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _describe(folder: Path, dataset: Dataset) -> None:
    write_json(
        folder / ABOUT,
        {
            "census": asdict(dataset.census),
            "bounds": dataset.bounds,
            "fingerprint": dataset.fingerprint,
            "checksums": checksums(folder, dataset.dtypes),
        },
    )


def _read(place: Path, form: type[Dataset]) -> Dataset | None:
    """The entry; None if there is none, or it is damaged, and then it is gone."""
    if not place.is_dir():
        return None
    try:
        about = read_json(place / ABOUT)
        arrays = mapped(place, form.dtypes)  # and so locked
        if checksums(place, form.dtypes) != about["checksums"]:
            raise DataError(f"{place} is damaged")
        census = about["census"]
        census["formats"] = tuple(map(tuple, census["formats"]))
        census["unread"] = tuple(census["unread"])
        dataset = form.of(arrays, Census(**census), tuple(about["bounds"]))
        # So that nothing has to be read again to know it.
        vars(dataset)["fingerprint"] = about["fingerprint"]
        os.utime(place / ABOUT)  # when it was last used
    except (CheckpointError, DataError, OSError, KeyError, TypeError):
        with suppress(OSError):
            shutil.rmtree(place)
        return None
    return dataset
