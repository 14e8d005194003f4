"""Files that people give, of which some are none."""

import errno
import os

from etils import epath


def read_file(path: epath.PathLike) -> bytes:
  """The contents of a file, local or of any place that etils.epath opens.

  Raises:
    OSError: it cannot be read, or is a folder, a device or a pipe, of which the latter two may never end.
  """
  if os.path.exists(path) and not os.path.isfile(path):
    raise OSError(errno.EINVAL, 'not a file')
  return epath.Path(path).read_bytes()
