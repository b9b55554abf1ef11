"""The 256 words of pairing codes, a byte each.

The list was written for Sealane: everyday English words of four to six letters, no two with the same first four.
"""

from typing import Final

_TEXT: Final = """
acorn agate album alder algae almond alpine amber anchor angle anvil apple apron arbor arch arena arrow ashes
aspen atlas attic autumn azure badge bagel baker bamboo banjo barley basil basket beacon beaver bench berry
birch bishop bison bobbin border bottle bread brick bridge bronze brush bucket bugle butter cabin cactus camel
candle canoe canvas canyon carbon carpet carrot castle cedar cello chalk cherry chess cider cinema circle citrus
clay cliff clock clover cobalt cocoa comet copper coral cotton cradle crane crater cubic daisy dancer decade
delta denim desert dinner domino donkey dragon drum dune eagle earth easel echo elbow engine epoch ermine fabric
falcon fennel fiddle field finch fjord flame flint flute forest fossil friday frost galaxy garden garlic geyser
ginger globe goblet golden grape gravel guitar gypsum hammer hazel hedge helmet heron honey hotel hunter igloo
indigo inlet iris island ivory jacket jade jaguar jelly jigsaw jungle kayak kernel kettle kitten kiwi knight
ladder lagoon laurel lava lemon lentil lilac lime linen lizard locket lotus lumber lynx magnet mango maple
marble market meadow melon meteor mirror monday moss museum nectar needle nickel north nutmeg oasis ocean olive
onion opal orange orbit orchid osprey otter oxygen oyster paddle palace panda paper pasta peach pebble pepper
piano pigeon pillow pine planet plum polar poppy prism purple puzzle quail quartz quiet rabbit radish raven reef
ribbon river robin ruby salmon satin shell smoke snow sofa spice star stone sugar swan tempo tiger toast topaz
tower trail tulip venus violet wagon water wheat wolf wood yacht zebra zinc
"""
WORDS: Final = tuple(_TEXT.split())
