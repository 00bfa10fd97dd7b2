"""The programs that packaging copies into a model repository. moeship itself imports none of them."""
