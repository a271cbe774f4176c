"""Scenes, feelings and uses in everyday words, and the things of the corpus that fit them; written by hand."""

from dataclasses import dataclass

from starter.data.concepts import listed


@dataclass(frozen=True)
class Theme:
    """Phrases with the same right things. A thing in brackets is a subgroup of the corpus: `[drink]`."""

    phrases: tuple[str, ...]
    things: tuple[str, ...]


def _theme(phrases: str, things: str) -> Theme:
    return Theme(listed(phrases), listed(things))


WINTER = "snowflake|snowman|snow-capped mountain|cloud with snow"
SEA_ANIMALS = "fish|tropical fish|blowfish|shark|octopus|jellyfish|dolphin|whale|squid|orca"

THEMES = tuple(
    _theme(*line)
    for line in (
        # weather and seasons
        ("winter|winter landscape|snowy landscape|a cold winter day|wintertime|deep snow|a snowy day", WINTER),
        (
            "winter mountains|snowy mountains|snow on the mountains|an icy mountain top",
            "snow-capped mountain|mount fuji",
        ),
        ("winter sports|sports in the snow|skiing holiday", "skis|snowboarder|sled|ice skate|curling stone"),
        ("it is snowing|falling snow|a snowstorm|snowy weather", "cloud with snow|snowflake|snowman"),
        (
            "rainy weather|a rainy day|it is raining|pouring rain|a shower of rain|rain falling|bad weather",
            "cloud with rain|umbrella with rain drops|sun behind rain cloud|cloud with lightning and rain",
        ),
        (
            "a thunderstorm|stormy weather|thunder and lightning|a heavy storm|a storm at sea",
            "cloud with lightning and rain|cloud with lightning|high voltage|tornado",
        ),
        ("a hurricane|a whirlwind|a strong storm|a twisting wind", "tornado|cyclone|wind face"),
        ("windy weather|a windy day|a strong breeze|a gust of wind", "wind face|leaf fluttering in wind|kite"),
        ("sunny weather|a sunny day|bright sunshine|good weather|a summer sky", "sun|sun with face|sun behind cloud"),
        ("cloudy weather|an overcast sky|a grey sky", "cloud|sun behind cloud|sun behind rain cloud|fog"),
        ("misty weather|a misty morning|thick fog|haze over the land", "fog|foggy"),
        (
            "spring|springtime|flowers in spring|a spring meadow",
            "cherry blossom|tulip|blossom|hyacinth|seedling|hatching chick",
        ),
        (
            "summer|summertime|a summer day|summer holidays",
            "sun|beach with umbrella|sunglasses|ice cream|soft ice cream",
        ),
        (
            "autumn|an autumn day|fall colours|autumn leaves|leaves in fall",
            "fallen leaf|maple leaf|jack-o-lantern|chestnut",
        ),
        # places and landscapes
        (
            "mountain landscape|high mountains|the Alps|mountain scenery|mountains on the horizon|a rocky peak",
            "mountain|snow-capped mountain|mount fuji|sunrise over mountains",
        ),
        (
            "the seaside|a day at the beach|a sandy beach|the coast|by the sea|a holiday by the sea",
            "beach with umbrella|desert island|water wave|palm tree",
        ),
        (
            "tropical island|a lonely island|paradise island|an island in the sea",
            "desert island|palm tree|beach with umbrella",
        ),
        ("the ocean|the sea|waves of the sea|rough sea|surf on the shore", "water wave"),
        (
            "under water|underwater world|life under the sea|animals in the sea|sea life|fish in the ocean"
            "|swimming in the sea|a coral reef|an aquarium",
            SEA_ANIMALS + "|coral",
        ),
        ("fish under water|a swimming fish|fish in an aquarium|some fish", "fish|tropical fish|blowfish"),
        ("a desert landscape|dry sandy land|sand dunes|hot desert", "desert|cactus|camel"),
        ("the forest|deep woods|a forest|in the woods|a dense forest|woodland", "evergreen tree|deciduous tree"),
        ("the jungle|rainforest|jungle animals", "palm tree|gorilla|monkey|tiger|parrot|leopard|orangutan"),
        (
            "the savanna|a safari|wild animals of Africa|African animals",
            "lion|elephant|giraffe|zebra|rhinoceros|hippopotamus|leopard",
        ),
        (
            "farm animals|life on the farm|animals on a farm|a farmyard",
            "cow|pig|chicken|rooster|goat|ewe|horse|ram|duck|tractor|cow face|pig face",
        ),
        ("pets|animals kept at home|house pets", "dog|cat|hamster|rabbit|dog face|cat face|rabbit face"),
        ("polar animals|animals of the arctic|life at the south pole", "penguin|polar bear|seal"),
        (
            "a city|the big city|skyscrapers|downtown|a modern town|city skyline|city streets",
            "cityscape|office building|cityscape at dusk",
        ),
        ("rain over a city|a town in the rain|city and rain", "cityscape|cloud with rain"),
        (
            "a city in the evening|city lights at night|a town after sunset|night in the city",
            "cityscape at dusk|night with stars|bridge at night",
        ),
        ("a village|a quiet street with houses|a small town|home sweet home", "houses|house|house with garden"),
        ("an old ruin|a haunted house|an abandoned house|a falling down house", "derelict house"),
        ("a medieval fortress|knights and castles|a palace|a fairytale castle", "castle|Japanese castle"),
        ("an ancient temple|ruins of Greece|an old Greek temple|a museum", "classical building"),
        ("a place to pray|a holy place|religious building", "[place-religious]"),
        ("a fairground|amusement park|fun fair", "ferris wheel|roller coaster|carousel horse|circus tent"),
        ("a playground|where children play", "playground slide"),
        ("camping in nature|a night in a tent|a campsite", "camping|tent"),
        ("morning sky|dawn|daybreak|the sun comes up|early morning", "sunrise|sunrise over mountains"),
        ("evening sky|dusk|the sun goes down|a red evening sky", "sunset|cityscape at dusk"),
        (
            "the night sky|a starry night|stars at night|the sky at night",
            "night with stars|milky way|star|glowing star|crescent moon|shooting star|full moon",
        ),
        (
            "outer space|the universe|the cosmos|space travel|astronomy",
            "rocket|ringed planet|satellite|astronaut|milky way|comet|flying saucer|star",
        ),
        ("a trip to the moon|a flight into space|a rocket launch|a spaceship taking off", "rocket|astronaut"),
        ("aliens|visitors from space|a creature from another planet", "alien|alien monster|flying saucer"),
        ("moonlight|the moon at night|a moonlit night", "full moon|crescent moon|full moon face|waxing crescent moon"),
        ("planet Earth|our world|the whole world", "globe showing Europe-Africa|globe with meridians|world map"),
        ("an eruption|hot lava|a mountain spitting fire", "volcano"),
        ("a campfire|something burning|flames|a blaze", "fire"),
        (
            "a garden|plants in a garden|a flower bed|gardening",
            "house with garden|potted plant|sunflower|rose|tulip|seedling",
        ),
        ("flowers|a bunch of flowers|blooming plants|a colourful flower", "[plant-flower]"),
        ("plants|green plants|vegetation|greenery", "[plant-other]"),
        # animals
        ("animals|creatures|beasts", "[animal-mammal]|[animal-bird]|[animal-marine]|[animal-reptile]"),
        ("birds|things with feathers|flying birds|birdlife", "[animal-bird]"),
        ("insects|creepy crawlies|little bugs|small crawling animals|tiny flying insects", "[animal-bug]"),
        ("reptiles|cold-blooded animals", "[animal-reptile]"),
        ("seafood|food from the sea", "shrimp|lobster|crab|oyster|squid|fried shrimp|sushi"),
        ("dinosaurs|prehistoric animals|animals that died out|extinct animals", "sauropod|T-Rex|mammoth|dodo"),
        ("fairytale creatures|mythical animals|imaginary animals", "unicorn|dragon|dragon face|phoenix"),
        ("fantasy people|magic beings|people of legends", "[person-fantasy]"),
        # food and drink
        ("something to drink|a drink|a glass of something|I am thirsty|beverages|refreshments", "[drink]"),
        (
            "an alcoholic drink|booze|drinks at a bar|spirits and liquor",
            "beer mug|wine glass|cocktail glass|tumbler glass|sake|bottle with popping cork|clinking beer mugs"
            "|tropical drink",
        ),
        (
            "a hot drink|something warm to drink|a cup of coffee|a mug of coffee|morning coffee|a cup of tea",
            "hot beverage|teacup without handle",
        ),
        ("something to eat|a meal|a dish|a warm meal|lunch|dinner", "[food-prepared]|[food-asian]"),
        ("breakfast|what one eats in the morning", "croissant|pancakes|cooking|bread|bacon|waffle|hot beverage|egg"),
        ("fast food|junk food|a takeaway meal", "hamburger|french fries|pizza|hot dog|taco|burrito|takeout box"),
        ("dessert|sweets|something sweet|sweet treats|a sugary snack", "[food-sweet]"),
        ("fruits|healthy fruit|fresh fruit|juicy fruit", "[food-fruit]"),
        ("greens|healthy vegetables|fresh vegetables", "[food-vegetable]"),
        ("baked goods|from the bakery|fresh bread", "bread|croissant|baguette bread|bagel|pretzel|flatbread"),
        ("Japanese food|Asian food|food from Japan|Chinese food", "[food-asian]"),
        (
            "birthday|a birthday party|it is my birthday",
            "birthday cake|party popper|balloon|wrapped gift|partying face",
        ),
        # travel
        ("vehicles|ways to travel|means of transport", "[transport-ground]|[transport-water]|[transport-air]"),
        ("boats|sea travel|boats on the water|a sea voyage", "[transport-water]"),
        (
            "things that fly|flying machines|air travel|going by plane|aircraft",
            "airplane|helicopter|small airplane|rocket",
        ),
        (
            "railways|going by train|a ride by rail|trains",
            "train|locomotive|high-speed train|bullet train|tram|metro|station",
        ),
        (
            "cars|road traffic|a motor car|a family car|driving a car",
            "automobile|sport utility vehicle|taxi|police car|racing car|pickup truck",
        ),
        ("lorries|big trucks|heavy goods vehicles", "articulated lorry|delivery truck|pickup truck|fire engine"),
        ("emergency services|rescue vehicles", "ambulance|fire engine|police car"),
        ("two wheels|bikes|riding a bike", "bicycle|motorcycle|motor scooter|kick scooter"),
        ("pirates|pirate ship|life of a pirate", "sailboat|ship|treasure chest|skull and crossbones"),
        # home, work, play
        ("clothes|something to wear|clothing|garments|fashion", "[clothing]"),
        (
            "shoes|something for the feet|footwear",
            "man's shoe|running shoe|hiking boot|flat shoe|high-heeled shoe|woman's boot|woman's sandal|ballet shoes",
        ),
        ("hats|something for the head|headgear", "top hat|woman's hat|billed cap|graduation cap|military helmet|crown"),
        ("jewels|jewellery|something precious", "ring|gem stone|crown"),
        ("swimwear|clothes for swimming", "bikini|one-piece swimsuit|shorts"),
        ("musical instruments|instruments of an orchestra|making music|a band", "[musical-instrument]"),
        ("music|a song|a tune|a melody", "musical note|musical score|headphone|[musical-instrument]"),
        (
            "tools|hand tools|a craftsman's tools|do it yourself|home repair",
            "hammer|wrench|screwdriver|carpentry saw|axe|toolbox|hammer and wrench|pick|clamp",
        ),
        ("weapons|arms|something to fight with", "dagger|crossed swords|bow and arrow|bomb|axe|water pistol|boomerang"),
        ("stationery|writing tools|something to write with", "[writing]"),
        (
            "school things|things for school|back to school",
            "backpack|pencil|books|notebook with decorative cover|school",
        ),
        ("reading|something to read|books to read|literature", "[book-paper]"),
        ("office things|desk supplies", "[office]"),
        ("computers|computer equipment|electronics", "[computer]"),
        ("telling the time|clocks|timepieces|what time is it", "[time]"),
        ("cleaning|household chores|cleaning things", "broom|bucket|soap|sponge|bubbles"),
        ("furniture|things in a living room|something to sit on", "couch and lamp|chair|bed"),
        ("the bathroom|taking a bath|washing oneself|personal hygiene", "bathtub|shower|toilet|soap|toothbrush"),
        ("medicine|medical things|at the doctor|health care", "[medical]"),
        ("science|a laboratory|chemistry|an experiment", "[science]"),
        ("money|cash|being rich|wealth|savings", "[money]"),
        ("the post|mail|a letter|sending a letter", "[mail]"),
        (
            "toys|something to play with|children's toys",
            "teddy bear|yo-yo|kite|nesting dolls|water pistol|puzzle piece",
        ),
        ("games|board games|a game night|gambling", "[game]"),
        ("sports|doing sports|athletics|physical exercise", "[sport]"),
        (
            "balls|ball games|a ball",
            "soccer ball|basketball|baseball|volleyball|tennis|american football|rugby football",
        ),
        ("prizes|an award|winning a contest|the winner", "[award-medal]"),
        ("Christmas|xmas|Christmas eve|presents under the tree", "Christmas tree|Santa Claus|wrapped gift|snowman"),
        ("Halloween|trick or treat|spooky things", "jack-o-lantern|ghost|vampire|zombie|skull|spider web|black cat"),
        ("new year's eve|a firework display|rockets in the sky", "fireworks|sparkler|party popper|firecracker"),
        (
            "a party|celebration|a festive day",
            "party popper|balloon|confetti ball|partying face|fireworks|birthday cake",
        ),
        ("getting married|bride and groom|marriage", "wedding|ring|bouquet"),
        ("death|a funeral|a grave|the cemetery", "coffin|headstone|funeral urn|skull"),
        ("art|painting a picture|an artist's things", "artist palette|paintbrush|framed picture|crayon"),
        ("sewing|needlework|knitting", "thread|sewing needle|yarn"),
        ("light|something that gives light|lamps|lighting", "light bulb|flashlight|candle|diya lamp|red paper lantern"),
        (
            "films|the cinema|making a movie|watching movies",
            "movie camera|clapper board|film projector|film frames|popcorn",
        ),
        ("fishing|going fishing|an angler", "fishing pole|fish"),
        ("magic|a magician|a spell|sorcery", "magic wand|mage|crystal ball|top hat"),
        (
            "working on a building site|roadworks|building work",
            "building construction|construction worker|construction",
        ),
        ("security|something locked|keeping a secret safe", "locked|locked with key|key|old key"),
        # people and feelings
        (
            "a happy person|someone who is happy|feeling good|a cheerful smile|a friendly smile|joyful",
            "grinning face|smiling face|grinning face with big eyes|beaming face with smiling eyes"
            "|slightly smiling face|smiling face with smiling eyes|grinning squinting face",
        ),
        (
            "someone laughing|laughing out loud|that is so funny",
            "face with tears of joy|rolling on the floor laughing|grinning squinting face",
        ),
        (
            "a sad person|someone who is sad|feeling down|sorrow|unhappiness|feeling blue",
            "crying face|frowning face|slightly frowning face|disappointed face|pensive face|loudly crying face"
            "|worried face",
        ),
        ("someone crying|weeping|in tears|a sobbing person", "crying face|loudly crying face|face holding back tears"),
        (
            "an angry person|someone who is angry|rage|feeling furious|a bad temper",
            "angry face|enraged face|face with steam from nose|face with symbols on mouth",
        ),
        (
            "a frightened person|someone who is scared|terror|feeling afraid",
            "fearful face|face screaming in fear|anxious face with sweat",
        ),
        (
            "someone in love|feeling loved|romance|falling in love|affection",
            "smiling face with heart-eyes|smiling face with hearts|red heart|two hearts|love letter|face blowing a kiss"
            "|sparkling heart|heart with arrow",
        ),
        (
            "a tired person|someone who is sleeping|falling asleep|taking a nap|fatigue",
            "sleeping face|sleepy face|yawning face|tired face|weary face",
        ),
        (
            "a sick person|someone who is ill|illness|having a cold|a fever",
            "face with thermometer|face with medical mask|sneezing face|nauseated face",
        ),
        ("a surprised person|someone astonished|what a surprise", "astonished face|face with open mouth|flushed face"),
        ("hearts|a symbol of love", "[heart]"),
        ("a gesture of approval|well done|I agree|good job", "thumbs up|clapping hands|OK hand"),
        ("saying hello|waving goodbye|a greeting", "waving hand"),
        ("applause|an audience clapping", "clapping hands"),
        ("prayer|begging|thank you", "folded hands"),
        ("parts of the body|body parts|the human body", "[body-parts]"),
        ("a smart person|a bookworm|a clever student", "nerd face"),
        ("royalty|a member of the royal family", "prince|princess|crown"),
        ("old people|grandparents|an elderly couple", "old man|old woman|older person"),
        ("kids|children|little ones|youngsters", "child|boy|girl|baby"),
        ("workers|people at work|jobs and professions", "[person-role]"),
    )
)
