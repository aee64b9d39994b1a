//! What the demo asks.

/// Longest answer in tokens.
pub const MAX_TOKENS: u32 = 120;

/// Asked before anything is measured: the first answer pays for memory that is touched for the first time.
pub const WARM_UP: &str = "Recite the alphabet.";

/// Kind and prompt. The tiny models that come with the sources answer all of them; so does any real one.
pub const PROMPTS: [(&str, &str); 10] = [
    ("code", "Write a Python class Stack for a stack."),
    ("code", "Write a Python function that sorts a list with bubble sort."),
    ("chat", "What is a hash table?"),
    ("chat", "Explain speculative decoding."),
    ("list", "Count from 1 to 30."),
    ("list", "Give me a numbered list of the planets of the solar system."),
    (
        "reasoning",
        "Tom has 12 apples and gets 7 more. Then Tom gives away 5. How many apples does Tom have now?",
    ),
    (
        "reasoning",
        "Anna has 4 boxes with 6 coins in each box. How many coins does Anna have?",
    ),
    ("creative", "Write a short story about a fox."),
    ("creative", "Tell me a story about a dragon in a castle."),
];
