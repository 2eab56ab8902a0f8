from freemerge.cli import main

main()
