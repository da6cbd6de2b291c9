from eupe.cli import main

main()
