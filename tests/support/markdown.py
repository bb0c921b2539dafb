"""Markdown read back."""
import re


def sections(text):
    """The text under each heading of the second level."""
    parts = re.split(r'^## (.+)$', text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text):
    """The tables of a text: each a list of rows, the first of them its head, each row a list of cells."""
    found, inside = [], False
    for line in text.splitlines():
        if not line.startswith('|'):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
        if not inside:
            found.append([])
        inside = True
        if set(line) - set('|-: '):
            found[-1].append(cells)
    return found


def pictures(text):
    """The files that a text shows."""
    return re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)


def snippets(text, of=None):
    """The Python snippets of a text: those for timm alone, or those of another trainer."""
    found = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    return [snippet for snippet in found
            if [name for name in ('transformers', 'lightning') if f'import {name}' in snippet] == ([of] if of else [])]
