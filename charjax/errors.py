"""The one exception a user is meant to read."""


class UserError(Exception):
  """Something the user can put right: a file, a field, a value.

  The message is one line that names the file, the field and the remedy. The command line prints it
  without a stack trace and exits with code 2.
  """
