"""freemerge inside other tools, for people who stay there: a module for each, which imports it."""
