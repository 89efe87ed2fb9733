"""`mtr schema`."""

from __future__ import annotations

from mtr.cli.session import errors

EXAMPLES = """Examples:
  mtr schema > schema.json  # then, as the first line of a recipe:
                            # # yaml-language-server: $schema=schema.json
  mtr schema | jq '."$defs".LoraSection.properties'
"""


def schema() -> None:
    """Print the JSON schema of recipes.

    Needs nothing. Editors with a YAML language server, such as VS Code with the YAML extension, then complete keys,
    show what they mean, and underline mistakes. Recipes that mtr writes name the schema in their first line.
    """
    with errors():
        from mtr.recipe.schema import schema_text

        print(schema_text())
