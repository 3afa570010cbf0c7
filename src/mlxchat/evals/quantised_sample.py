"""The text (about 500 tokens) on which the cost of quantised weights is measured."""

SAMPLE = """\
The river rises in the hills above the town and runs south for about two hundred kilometres before it reaches
the sea. In spring, when the snow melts, it is deep and fast; by the end of August one can walk across it in
many places. Most of the people who live along its banks are farmers. They grow wheat, barley and potatoes, and
keep sheep on the slopes where nothing else will grow.

Water boils at 100 degrees Celsius at sea level. On a high mountain the air is thinner, so it boils at a lower
temperature, and eggs take longer to cook. The capital of France is Paris; the capital of Japan is Tokyo. A year
has twelve months, a week has seven days, and a day has twenty-four hours.

Question: A shop sells pencils for 3 coins each. Anna buys 7 pencils and pays with a note of 50 coins. How much
does she get back?
Answer: The pencils cost 3 * 7 = 21 coins. She gets back 50 - 21 = 29 coins. The answer is 29.

Question: How many times does the letter r stand in the word strawberry?
Answer: s-t-r-a-w-b-e-r-r-y: the letter r stands there three times.

And it came to pass in those days that there was no bread in the land, and the people went out to the king and
said, Give us something to eat. And he opened the storehouses and gave to every man according to the number of
his house.

def mean(numbers):
    total = 0
    for number in numbers:
        total += number
    return total / len(numbers)

She had never liked the house. It was too large for two people, and the wind came in under the doors all winter
long. But when the letter came, saying that it would be sold, she sat down on the stairs and found that she
could not bear to leave it. "We will think of something," said her brother, though neither of them knew what
that might be.
"""
