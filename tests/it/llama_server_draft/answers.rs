//! The answer is the same with and without a drafter.

use super::{assert_same, assert_same_second_turn, completion, server, server_with, text_of};
use crate::harness::drafter::{drafted, perfect, wrong_at_every};
use crate::harness::llama_server::{LlamaServer, essence, target};
use crate::harness::request::with;
use serde_json::{Value, json};

#[tokio::test]
async fn a_perfect_drafter_saves_most_passes_and_does_not_change_the_answer() {
    let server = server().await;
    let body = completion("Once upon a time", 60);
    let followed = assert_same(&server, "/completion", &body).await;
    // 8 at best: the first token comes from the prompt, then up to 9 of a pass; some pass before the drafter is there
    assert!((8..20).contains(&followed.last.n_steps), "{:?}", followed.last);
    assert_eq!(followed.last.n_accepted, 60 - followed.last.n_steps);
    assert_eq!(followed.last.n_prompt, server.tokenize("Once upon a time").await.len());
    assert_eq!(followed.committed.len(), followed.last.n_prompt + 60);
}

#[tokio::test]
async fn sampling_with_a_seed_gives_the_same_answer_with_and_without_a_drafter() {
    let server = server().await;
    for more in [
        json!({ "temperature": 1.0, "seed": 7 }),
        json!({ "temperature": 0.8, "seed": 8, "top_k": 20, "repeat_penalty": 1.3, "dry_multiplier": 0.8 }),
        json!({ "temperature": 1.5, "seed": 9, "mirostat": 2 }),
    ] {
        let body = with(completion("Once upon a time", 60), more);
        assert_same(&server, "/completion", &body).await;
    }
}

#[tokio::test]
async fn log_probabilities_of_accepted_tokens_are_those_of_an_undrafted_run() {
    let server = server().await;
    for more in [
        json!({ "n_probs": 3 }),
        json!({ "n_probs": 3, "temperature": 1.0, "seed": 7 }),
        json!({ "n_probs": 3, "temperature": 1.0, "seed": 7, "post_sampling_probs": true }),
        json!({ "n_probs": 2, "stream": true }),
    ] {
        let body = with(completion("Once upon a time", 40), more);
        assert_same(&server, "/completion", &body).await;
    }
    let chat = json!({
        "messages": [{ "role": "user", "content": "Write a short story about a dog." }],
        "max_tokens": 40, "temperature": 0, "cache_prompt": false, "logprobs": true, "top_logprobs": 2,
    });
    assert_same(&server, "/v1/chat/completions", &chat).await;
    let legacy = json!({ "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "cache_prompt": false, "logprobs": 2 });
    assert_same(&server, "/v1/completions", &legacy).await;
}

#[tokio::test]
async fn every_completion_endpoint_can_be_drafted_for_streamed_or_not() {
    let server = server().await;
    let messages = json!([{ "role": "user", "content": "Count from 1 to 10." }]);
    for stream in [false, true] {
        for (path, body) in [
            (
                "/v1/completions",
                json!({ "prompt": "Once upon a time", "max_tokens": 30 }),
            ),
            (
                "/v1/chat/completions",
                json!({ "messages": messages, "max_tokens": 30 }),
            ),
            (
                "/v1/responses",
                json!({ "input": "Count from 1 to 10.", "max_output_tokens": 30 }),
            ),
            ("/v1/messages", json!({ "messages": messages, "max_tokens": 30 })),
        ] {
            let body = with(
                body,
                json!({ "stream": stream, "temperature": 0, "cache_prompt": false }),
            );
            assert_same(&server, path, &body).await;
        }
    }
}

#[tokio::test]
async fn grammars_schemas_and_tools_constrain_drafted_tokens_too() {
    let server = server().await;
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 20 }, "age": { "type": "integer", "maximum": 99 } },
        "required": ["name", "age"],
    });
    let body = with(completion("A person: ", 60), json!({ "json_schema": schema }));
    assert_same(&server, "/completion", &body).await;

    let body = with(
        completion("Numbers: ", 40),
        json!({ "grammar": "root ::= (\"one\" | \"two\" | \"three\") (\", \" root)?" }),
    );
    assert_same(&server, "/completion", &body).await;

    let body = json!({
        "messages": [{ "role": "user", "content": "What is the weather in Paris?" }],
        "tools": [{ "type": "function", "function": {
            "name": "weather", "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] },
        } }],
        "tool_choice": "required", "max_tokens": 60, "temperature": 0, "cache_prompt": false,
    });
    assert_same(&server, "/v1/chat/completions", &body).await;
}

#[tokio::test]
async fn an_answer_ends_where_it_would_have_ended_in_the_middle_of_a_draft() {
    let server = server().await;
    let body = completion("Once upon a time", 60);
    let long = text_of(&server, "/completion", &body).await;
    let plain = server.post("/completion", &body).await;
    let content = plain["content"].as_str().expect("a text");

    // a stop string that begins within a word somewhere in the text; the drafter would go on
    let stop: String = content.chars().skip(40).take(6).collect();
    let body = with(body, json!({ "stop": [stop] }));
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["stop_type"], "word");
    let (answer, followed) = drafted(&server, "/completion", &body, perfect(&long, 8)).await;
    assert_eq!(essence(answer), essence(plain.clone()));
    assert!(followed.last.n_accepted > 0);
    let n_generated = plain["tokens"].as_array().expect("tokens").len();
    assert_eq!(
        followed.committed.len() - followed.last.n_prompt,
        n_generated,
        "no token after the stop is committed"
    );

    // n_predict
    for n_predict in [1, 2, 3, 9, 10, 11] {
        let body = completion("Once upon a time", n_predict);
        let plain = server.post("/completion", &body).await;
        let (answer, followed) = drafted(&server, "/completion", &body, perfect(&long, 8)).await;
        assert_eq!(essence(answer), essence(plain), "n_predict {n_predict}");
        assert_eq!(followed.committed.len() - followed.last.n_prompt, n_predict as usize);
    }

    // the end of generation, drafted, with more after it
    let chat = json!({
        "messages": [{ "role": "user", "content": "What is the capital of France?" }],
        "temperature": 0, "cache_prompt": false,
    });
    let plain = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(plain["choices"][0]["finish_reason"], "stop");
    let text = text_of(&server, "/v1/chat/completions", &chat).await;
    let beyond = [&text[..], &[1000; 20]].concat();
    let (answer, followed) = drafted(&server, "/v1/chat/completions", &chat, perfect(&beyond, 8)).await;
    assert_eq!(essence(answer), essence(plain));
    assert_eq!(followed.committed, text);
    assert!(followed.last.n_accepted > 0);
}

#[tokio::test]
async fn a_server_that_drafts_by_itself_does_so_where_nothing_is_offered() {
    let draft = crate::harness::llama_server::model("tightwad-tiny-draft-f16.gguf");
    let own = [
        "-md",
        draft.to_str().expect("UTF-8"),
        "--spec-type",
        "draft-simple",
        "--spec-draft-n-max",
        "4",
    ];
    let server = server_with(&own).await;
    let body = completion("Once upon a time", 40);
    let (answer, followed) = drafted(&server, "/completion", &body, |_| Vec::new()).await;
    assert_eq!(followed.last.n_drafted, 0);
    assert!(answer["timings"]["draft_n_accepted"].as_u64() > Some(0), "{answer}");

    let without = LlamaServer::start(&target(), &[&["-np", "1"], &own[..]].concat()).await;
    let plain = without.post("/completion", &body).await;
    assert_eq!(plain["content"], answer["content"]);
    assert_eq!(
        plain["timings"]["draft_n_accepted"],
        answer["timings"]["draft_n_accepted"]
    );
}

#[tokio::test]
async fn a_request_without_a_drafter_gets_nothing_of_what_was_offered_to_an_earlier_one() {
    let server = server().await;
    let body = completion("Once upon a time", 20);
    let text = text_of(&server, "/completion", &body).await;
    let (_, followed) = drafted(&server, "/completion", &body, perfect(&text, 8)).await;
    assert!(followed.last.n_accepted > 0);
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["timings"]["draft_n"], Value::Null, "{plain}");
}

#[tokio::test]
async fn a_context_shift_keeps_the_drafter_in_step() {
    let server = server_with(&["-c", "256", "--context-shift"]).await;
    let body = with(completion("Once upon a time", 500), json!({ "ignore_eos": true }));
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["truncated"], true, "the context was shifted");
    let followed = assert_same(&server, "/completion", &body).await;
    assert!(followed.last.n_steps < 150, "{:?}", followed.last);
}

#[tokio::test]
async fn without_context_shift_an_answer_ends_at_the_same_token() {
    let server = server_with(&["-c", "256"]).await;
    let body = with(completion("Once upon a time", 500), json!({ "ignore_eos": true }));
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["truncated"], true);
    assert_same(&server, "/completion", &body).await;
}

#[tokio::test]
async fn the_memory_holds_the_same_after_a_drafted_answer() {
    let server = server().await;
    assert_same_second_turn(&server).await;
}

#[tokio::test]
async fn a_sampler_looks_back_no_further_than_the_context() {
    let server = server().await;
    let body = json!({ "repeat_last_n": 500_000_000, "dry_penalty_last_n": 500_000_000, "dry_multiplier": 0.5, "repeat_penalty": 1.1 });
    server
        .post("/completion", &with(completion("Once upon a time", 5), body))
        .await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .and_then(|peak| peak.trim().strip_suffix(" kB")?.parse().ok())
        .expect("the peak of its memory");
    assert!(peak < 500_000, "{peak} kB");
}

#[tokio::test]
async fn counters_and_usage_add_up() {
    let server = server_with(&["--metrics"]).await;
    let body = json!({
        "messages": [{ "role": "user", "content": "Count from 1 to 10." }],
        "max_tokens": 40, "temperature": 0, "cache_prompt": false,
    });
    let text = text_of(&server, "/v1/chat/completions", &body).await;
    let (answer, followed) = drafted(&server, "/v1/chat/completions", &body, wrong_at_every(7, &text, 8)).await;
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    assert_eq!(answer["usage"]["prompt_tokens"], followed.last.n_prompt);
    let last = &followed.last;
    assert_eq!(answer["timings"]["draft_n"], last.n_drafted);
    assert_eq!(answer["timings"]["draft_n_accepted"], last.n_accepted);
    // every pass gives one token of its own
    assert_eq!(last.n_steps + last.n_accepted, 40);

    let metrics = server.get_text("/metrics").await;
    let counter = |name: &str| {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
        line.parse::<usize>().expect("a number")
    };
    assert_eq!(counter("llamacpp:spec_decode_num_draft_tokens_total"), last.n_drafted);
    assert_eq!(
        counter("llamacpp:spec_decode_num_accepted_tokens_total"),
        last.n_accepted
    );
    // of all runs, those to which the drafter came late included
    let n_predicted = counter("llamacpp:tokens_predicted_total");
    assert!(n_predicted >= 80 && n_predicted % 40 == 0, "{n_predicted}");
}
