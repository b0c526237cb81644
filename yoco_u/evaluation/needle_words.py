"""The words of which the keys of needles consist, in the form `adjective-noun`."""

_ADJECTIVES = """
amber ample ancient arctic autumn bitter blank bold brave brief bright brisk broad bronze calm
careful cheerful civil clear clever cold copper coral crisp curious dapper daring deep distant dusty eager early earnest
elder elegant faint famous fierce final fluent foggy formal frozen gentle giant gilded glad golden graceful grand green
hazel heavy hidden hollow honest humble idle inner ivory jolly keen kind lavish level lively lofty loyal lucky lunar mellow
mighty modest narrow neat nimble noble northern odd olive orange patient plain polite proud quaint quick quiet rapid rare
rigid robust rosy royal rustic scarlet serene sharp silent silver simple sleepy slender smooth sober solar solid spare
steady stern subtle sunny swift tender tidy tiny upper vast velvet violet vivid wandering warm wild wise wooden young
"""

_NOUNS = """
acorn anchor apple arrow badge bakery barrel basin basket beacon bell bench blanket bottle bridge bucket button cabin camel
candle canoe canyon carpet castle cellar chapel chimney clover comet compass cottage cradle crown curtain dagger daisy
desert dolphin donkey dragon eagle easel ember engine falcon feather fence ferry fiddle flute forest fossil fountain garden
garlic glacier glove granite guitar hammer harbor harvest hedge helmet heron island jacket jungle kettle kitten ladder
lantern lemon library lizard magnet mango marble meadow mirror monsoon mountain needle nest oasis orchard otter oyster
paddle parade parrot pebble pencil pepper piano pillow planet pocket puzzle quarry rabbit raven ribbon river rocket saddle
sailor salmon shadow shovel sparrow spoon stable temple thunder ticket tiger timber tower trumpet tunnel turtle valley
vessel violin voyage waffle walnut willow window winter zebra
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
