//! Drafting for targets that no drafter can attach to. The proxy drives the answer in rounds: each round asks the target to
//! verify a draft in one step and sends on the tokens that the target chose.
//!
//! Invariant: the answer is the one that the target itself would give. So only greedy requests for text without tools are
//! answered in rounds. All others, and those that fail before the first word, are forwarded to the target unchanged. The
//! proxy passes a [`verifier`] to the engine, which probes it; then it makes an [`Answer`] per request.
//!
//! | file | what it does |
//! | --- | --- |
//! | `request` | finds the requests that can be answered in rounds (pure) |
//! | `round` | the state machine of an answer (pure) |
//! | `text` | stop strings across rounds (pure) |
//! | `openai` | the answer as JSON and as events (pure) |
//! | `fan_out` | verifies with a stock llama-server: one prompt for each length of the draft, in one request |
//! | `scored` | verifies with vLLM and SGLang: the likeliest token at each position of a prompt |
//! | `answer` | carries out the actions of `round` |
//!
//! Known differences from the target's own answer: a special token inside of an answer is shown, though the target would leave
//! it out (except with SGLang); the limit of `llama-server -n` is unknown. A chat whose answer begins like a reasoning block
//! or markup goes to the target, which may have a parser for it.

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
