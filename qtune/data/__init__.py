"""Training data: sources -> rows -> records -> token ids with the mask of what is trained -> examples."""

from .chat import read_template
from .choices import Question, load_questions
from .encode import Encoder
from .load import Sets, load_data, load_held_out, load_sets, load_source, read_records, tokenize
from .records import Record
from .report import DataReport, Example, show_example

__all__ = [
    "DataReport", "Encoder", "Example", "Question", "Record", "Sets", "load_data", "load_held_out", "load_questions",
    "load_sets", "load_source", "read_records", "read_template", "show_example", "tokenize",
]  # fmt: skip
