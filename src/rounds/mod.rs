//! Answers in rounds, for targets that no drafter can attach to: the proxy asks the target to verify a draft, says what it
//! chose, and asks again.
//!
//! Only requests that can be answered so exactly as the target would are: greedy ones, of text, without tools. All others,
//! and those of which anything fails before the first word, go to the target untouched.
//!
//! | file | what it does |
//! | --- | --- |
//! | `request` | which requests can be answered in rounds (pure) |
//! | `round` | what to ask next, and what the answers mean (pure) |
//! | `text` | stop strings, over the borders of rounds (pure) |
//! | `openai` | the answer's JSON and events (pure) |
//! | `target` | what a target must be able to do |
//! | `fan_out` | a stock llama-server: one prompt for each length of the draft, in one request |
//! | `scored` | vLLM and SGLang: the likeliest tokens beside those of a prompt |
//! | `proof` | whether a target does that exactly, tried when it comes up |
//! | `answer` | carries the actions of `round` out |
//!
//! Known differences to the target's own answer: a special token that the model writes inside of an answer, and that the
//! target would leave out of the text, is shown (not by SGLang); a limit of `llama-server -n` is not known. A chat whose
//! answer begins like a reasoning block or markup goes to the target, which may have a parser for it.

mod answer;
mod fan_out;
mod openai;
mod proof;
mod request;
mod round;
mod scored;
mod target;
mod text;

pub use answer::Answer;
pub use fan_out::FanOut;
pub use proof::{Flaw, PROOF_TEXT, prove};
pub use request::{Endpoint, Request};
pub use round::{Action, Event, Finish, Rounds, VerifyContext};
pub use scored::Scored;
pub use target::{Ask, Prompt, Target, Verdict};
