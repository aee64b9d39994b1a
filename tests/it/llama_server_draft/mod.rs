//! The patched llama-server: an external drafter makes a completion faster and cannot change it.

mod answers;
mod calls;
mod connections;
mod holding;
mod models;
mod slots;

use crate::harness::drafter::{Followed, drafted, perfect, wrong_at_every};
use crate::harness::llama_server::{LlamaServer, essence, target};
use crate::harness::request::with;
use serde_json::{Value, json};

const EXTERNAL: [&str; 4] = ["--spec-draft-external-max", "8", "-np", "1"];

async fn server() -> LlamaServer {
    LlamaServer::start(&target(), &EXTERNAL).await
}

async fn server_with(args: &[&str]) -> LlamaServer {
    LlamaServer::start(&target(), &[&EXTERNAL, args].concat()).await
}

/// A greedy completion without the prompt cache, so that every run begins alike.
fn completion(prompt: &str, n_predict: u32) -> Value {
    json!({
        "prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": false, "return_tokens": true,
    })
}

/// Prompt and answer of a completion that nobody drafts for, in tokens.
async fn text_of(server: &LlamaServer, path: &str, body: &Value) -> Vec<i32> {
    let (_, followed) = drafted(server, path, body, |_| Vec::new()).await;
    assert_eq!(followed.last.n_drafted, 0);
    followed.committed
}

/// Run `body` plain, then with a perfect drafter, then with one that errs: all answers must be the same. What the perfect
/// drafter saw is returned.
async fn assert_same(server: &LlamaServer, path: &str, body: &Value) -> Followed {
    let plain = server.post(path, body).await;
    let text = text_of(server, path, body).await;

    let (answer, perfectly) = drafted(server, path, body, perfect(&text, 8)).await;
    assert_eq!(essence(answer), essence(plain.clone()), "with a perfect drafter");
    assert_eq!(perfectly.committed, text);
    assert_eq!(perfectly.last.n_accepted, perfectly.last.n_drafted);
    assert!(
        perfectly.last.n_accepted > 0,
        "nothing was drafted: {:?}",
        perfectly.last
    );

    let (answer, badly) = drafted(server, path, body, wrong_at_every(5, &text, 8)).await;
    assert_eq!(essence(answer), essence(plain), "with a drafter that errs");
    assert_eq!(badly.committed, text);
    assert!(badly.last.n_accepted > 0, "nothing was accepted: {:?}", badly.last);
    assert!(
        badly.last.n_accepted < badly.last.n_drafted,
        "nothing was rejected: {:?}",
        badly.last
    );

    perfectly
}

/// Two turns of a conversation: the second must find the same in the memory, whether the first was drafted for or not.
async fn assert_same_second_turn(server: &LlamaServer) {
    let cached = json!({ "cache_prompt": true, "ignore_eos": true });
    let first = with(completion("Once upon a time", 30), cached.clone());
    let text = text_of(server, "/completion", &first).await;
    // the tokens themselves, since another text may be tokenised in another way
    let prompt = [&text[..], &[1000, 1001, 1002]].concat();
    let second = with(with(completion("", 30), json!({ "prompt": prompt })), cached);

    // nothing is left of an earlier prompt
    let forget = completion("x", 1);
    server.post("/completion", &forget).await;
    server.post("/completion", &first).await;
    let plain = server.post("/completion", &second).await;

    for step in [3, 4, 5, 1000] {
        server.post("/completion", &forget).await;
        let (_, followed) = drafted(server, "/completion", &first, wrong_at_every(step, &text, 8)).await;
        assert_eq!(followed.committed, text);
        assert!(followed.last.n_accepted > 0);
        let after_drafts = server.post("/completion", &second).await;
        assert_eq!(after_drafts["tokens"], plain["tokens"], "wrong at every {step}");
        assert_eq!(
            after_drafts["timings"]["cache_n"], plain["timings"]["cache_n"],
            "wrong at every {step}"
        );
    }
}
