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
//! | `fan_out` | a stock llama-server: one prompt for each length of the draft, in one request |
//! | `scored` | vLLM and SGLang: the likeliest tokens beside those of a prompt |
//! | `answer` | carries the actions of `round` out |
//!
//! Known differences to the target's own answer: a special token that the model writes inside of an answer, and that the
//! target would leave out of the text, is shown (not by SGLang); a limit of `llama-server -n` is not known. A chat whose
//! answer begins like a reasoning block or markup goes to the target, which may have a parser for it.

mod answer;
mod fan_out;
mod openai;
mod request;
mod round;
mod scored;
mod text;

use std::sync::Arc;

use crate::config::{Backend, Secret, Upstream};
use crate::engine::Verifier;
use crate::upstream::{LlamaServer, Sglang, Vllm};

pub use answer::Answer;
pub use fan_out::FanOut;
pub use request::{Request, endpoint_at};
pub use round::{Action, Event, Finish, Rounds};
pub use scored::Scored;

/// The verifier of a target that may be asked in rounds. Fails only when the system cannot set up an HTTP client.
pub fn verifier(target: &Upstream, key: Option<Secret>) -> Result<Option<Arc<dyn Verifier>>, reqwest::Error> {
    let (url, model) = (&target.url, target.model_name.clone());
    Ok(Some(match target.backend {
        Backend::Llamacpp => {
            let server = LlamaServer::new(url, key)?.with_draft_key(target.draft_key.clone());
            Arc::new(FanOut::new(server))
        }
        Backend::Vllm => Arc::new(Scored::new(Vllm::new(url, key, model)?)),
        Backend::Sglang => Arc::new(Scored::new(Sglang::new(url, key, model)?)),
        Backend::Ollama | Backend::Openai => return Ok(None),
    }))
}
