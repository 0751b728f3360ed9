"""Findings in words: a line of text in a script, bold in a notebook, the same sentence in both."""

import sys

import nbformat
from nbclient import NotebookClient

from lenslab.files import REPOSITORY
from lenslab.show.words import so

sys.path.insert(0, str(REPOSITORY / "scripts"))
from build_site import render_output


def test_a_script_prints_the_sentence(capsys):
    so("three of four heads copy (the twin none).")
    assert capsys.readouterr().out == "So: three of four heads copy (the twin none).\n"


def test_a_notebook_shows_it_bold_and_keeps_the_line_that_is_compared():
    source = "from lenslab.show.words import so\nso('none (the twin none).')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"] == "So: none (the twin none)."
    assert output.data["text/markdown"] == "**So:** none (the twin none)."


def test_a_page_shows_it_as_a_paragraph_and_its_text_stays_text():
    data = {"text/plain": "So: 2 of 3 '<b>' (the twin none).", "text/markdown": "**So:** ..."}
    output = {"output_type": "display_data", "data": data}
    page, entry = render_output(output, "output-1-0", "What was found")
    assert (
        page == ('<p class="so"><b>So:</b> 2 of 3 &#x27;&lt;b&gt;&#x27; (the twin none).</p>')
        and entry is None
    )
