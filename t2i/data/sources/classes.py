"""An ImageNet folder: images in one sub-folder per class.

    ImageNet/train/n01440764/n01440764_10026.JPEG ...

A class id is the position of the folder's name among all of them, sorted, as for every published
class-conditional model.
"""

from pathlib import Path

from t2i.data.content import name_in, printable
from t2i.data.samples import IMAGE_SUFFIXES, Sample, Source
from t2i.data.sources.folders import holds_images, is_hidden, is_image, walk
from t2i.data.sources.splits import folders_of, split_of_folder
from t2i.errors import UserError, shorten


class LabelledFolder(Source):
    """A folder with train/ (and val/), or one of these splits, with one sub-folder per class.

    Attributes:
        classes: names, sorted; an image's label is the position of its class.
        paths: all images, by class and name.
        labels: one for each path.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self._root, self.classes = root, classes = find_classes(folder, split)
        self.paths: list[Path] = []
        self.labels: list[int] = []
        empty: list[str] = []
        hidden = (path for path in sorted(root.iterdir()) if is_hidden(path.name) and path.is_dir())
        left_out = [(f"{name_in(root, p)}/", "hidden folder") for p in hidden if holds_images(p)]
        for label, name in enumerate(classes):
            inside, passed_over = walk(root / name)
            found = [path for path in inside if is_image(path)]
            self.paths += found
            self.labels += [label] * len(found)
            empty += [] if found else [name]
            left_out += [(f"{printable(name)}/{key}", reason) for key, reason in passed_over]
            left_out += [
                (name_in(root, path), "no name of an image") for path in inside if _odd(path)
            ]
        if not self.paths:
            raise UserError(f"{root} has {len(classes)} sub-folders, but no images in them")
        # `files` names only the classes that have images; an empty one takes up a class id, too.
        identity = {"kind": "labelled folder", "classes": len(classes)}
        identity |= {"empty_classes": empty} if empty else {}
        super().__init__(str(root), identity, len(self.paths))
        self.left_out = left_out
        if empty:
            self.remarks.append(
                f"{len(empty)} of {len(classes)} classes have no images ({empty[0]}, ...)"
            )
        numbers = {name: label for label, name in enumerate(classes) if name.isdecimal()}
        other = [(name, label) for name, label in numbers.items() if int(name) != label]
        if other and len(numbers) == len(classes):
            name, label = other[0]
            self.remarks.append(
                f"folder {name} is class {label}: names are sorted as text, even if all are numbers. "
                "If they are the class ids, start with 0 and give all names the same number of digits"
            )

    def files(self) -> list[tuple[str, Path]]:
        return [(str(path.relative_to(self._root)), path) for path in self.paths]

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        return Sample(index, name_in(self._root, path), path, [], label=self.labels[index])


def find_classes(folder: str | Path, split: str) -> tuple[Path, list[str]]:
    """The folder of the split and the names of its sub-folders, which are not read yet.

    Raises:
        UserError: no such folder, no sub-folders, or images next to them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder; give the one that holds {split}/<class>/")
    parts = [path for path in _visible(root) if path.is_dir()]
    named = folders_of(split, [path.name for path in parts])
    part = root / named[0] if len(named) == 1 else None
    if part is not None and any(path.is_dir() for path in _visible(part)):  # else it is a class
        root = part
    elif parts and (split != "train" or all(split_of_folder(path.name) for path in parts)):
        found = shorten([printable(path.name) for path in parts], most=3)
        raise UserError(f"{root} has no sub-folder {split!r} with one per class, only {found}")
    children = _visible(root)
    classes = [path.name for path in children if path.is_dir()]
    loose = [path.name for path in children if is_image(path) and not path.is_dir()]
    if loose or not classes:
        holds = f"holds {len(loose)} images ({loose[0]}, ...)" if loose else "has no sub-folders"
        raise UserError(
            f"{root} must hold one sub-folder per class and nothing else, such as ImageNet's "
            f"train/n01440764/; it {holds}"
        )
    return root, classes


def _odd(path: Path) -> bool:
    """Whether a file may be an image although its name does not end like one: 17, 17.jpg_large."""
    suffix = path.suffix.lower()
    return not is_image(path) and (not suffix or suffix.startswith(tuple(IMAGE_SUFFIXES)))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
