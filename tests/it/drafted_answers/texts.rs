//! Every kind of request, with drafters that do their work.

use super::{CHAT, PROMPTS, chat, greedy, is_the_targets_own, same_and_drafted, sampled, stage, start_draft};
use crate::harness::fake_drafter::FakeDrafter;
use crate::harness::proxy::Proxy;
use crate::harness::request::with;
use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tightwad::upstream::{DraftPiece, WrittenTokens};

/// A chat as the models read it.
const RAW: &str = "<|im_start|>user\nExplain recursion.<|im_end|>\n<|im_start|>assistant\n";

#[tokio::test]
async fn the_answers_to_many_prompts_are_the_targets_own() {
    let stage = stage().await;
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        for (sampling, max_tokens) in [(greedy(), 80), (with(sampled(), json!({ "seed": i })), 40)] {
            let body = with(
                with(chat(prompt, max_tokens), sampling),
                json!({ "stream": i % 2 == 0 }),
            );
            stage.same_and_drafted(CHAT, &body).await;
        }
    }
}

#[tokio::test]
async fn with_a_good_drafter_the_target_takes_far_fewer_steps_than_tokens() {
    let stage = stage().await;
    let before = stage.draft.generated().await;
    let mut seen = Vec::new();
    // Where others keep the processor from the drafter, its drafts come late: such a round proves nothing.
    while seen.len() < 4 {
        let (mut steps, mut generated) = (0, 0);
        for prompt in PROMPTS {
            let (_, record) = stage.proxy.post(CHAT, &with(chat(prompt, 80), greedy())).await;
            steps += record.steps;
            generated += record.generated;
        }
        assert!(generated > 500, "{generated} tokens");
        if steps * 10 < generated * 6 {
            // It was not the text itself that was guessed from.
            assert!(stage.draft.generated().await > before + generated / 2);
            return;
        }
        seen.push(format!("{steps} steps for {generated} tokens"));
    }
    panic!("{seen:?}");
}

#[tokio::test]
async fn every_endpoint_gives_the_targets_own_answer_streamed_or_not() {
    let stage = stage().await;
    let messages = chat("Explain recursion.", 40);
    for stream in [false, true] {
        for sampling in [greedy(), sampled()] {
            for (path, body) in [
                (CHAT, messages.clone()),
                ("/v1/messages", messages.clone()),
                (
                    "/v1/responses",
                    json!({ "input": "Explain recursion.", "max_output_tokens": 40 }),
                ),
                ("/v1/completions", json!({ "prompt": RAW, "max_tokens": 40 })),
                (
                    "/completion",
                    json!({ "prompt": RAW, "n_predict": 40, "return_tokens": true }),
                ),
            ] {
                let body = with(with(body, sampling.clone()), json!({ "stream": stream }));
                stage.same_and_drafted(path, &body).await;
            }
        }
    }
}

#[tokio::test]
async fn the_pieces_of_a_stream_make_up_the_whole_answer() {
    let stage = stage().await;
    let body = with(chat("Write a short story about a dog.", 60), sampled());
    let (whole, _) = stage.same_and_drafted(CHAT, &body).await;
    let streamed = with(
        body,
        json!({ "stream": true, "stream_options": { "include_usage": true } }),
    );
    let (events, _) = stage.same_and_drafted(CHAT, &streamed).await;
    let events = events.as_array().expect("events");
    let pieces: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], pieces.as_str());
    let reasons: Vec<_> = events
        .iter()
        .map(|event| &event["choices"][0]["finish_reason"])
        .filter(|reason| !reason.is_null())
        .collect();
    assert_eq!(reasons, [&whole["choices"][0]["finish_reason"]]);
    let usage: Vec<_> = events
        .iter()
        .map(|event| &event["usage"])
        .filter(|usage| !usage.is_null())
        .collect();
    assert_eq!(usage, [&whole["usage"]]);
}

#[tokio::test]
async fn the_status_the_answer_and_the_usage_count_alike() {
    let stage = stage().await;
    let body = with(chat("Count from 1 to 10.", 50), greedy());
    let (answer, record) = stage.proxy.post(CHAT, &body).await;
    assert_eq!(answer["timings"]["predicted_n"], record.generated, "{record:?}");
    assert_eq!(answer["usage"]["completion_tokens"], record.generated, "{record:?}");
    if record.drafted > 0 {
        assert_eq!(answer["timings"]["draft_n"], record.drafted, "{record:?}");
        assert_eq!(answer["timings"]["draft_n_accepted"], record.accepted, "{record:?}");
    }
}

#[tokio::test]
async fn schemas_grammars_and_tool_calls_constrain_drafted_tokens_too() {
    let stage = stage().await;
    // A real drafter, which knows nothing of the constraints, would seldom be right.
    let draft = FakeDrafter::remembering(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    let schema = json!({
        "type": "object",
        "properties": { "answer": { "type": "string", "maxLength": 120 }, "sure": { "type": "boolean" } },
        "required": ["answer", "sure"],
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } });
    let tool = json!({ "type": "function", "function": {
        "name": "count_words",
        "parameters": { "type": "object", "properties": { "text": { "type": "string", "maxLength": 80 } }, "required": ["text"] },
    } });
    for sampling in [greedy(), sampled()] {
        for stream in [false, true] {
            let more = with(sampling.clone(), json!({ "stream": stream }));

            let body = with(
                with(chat("Explain recursion.", 120), json!({ "response_format": format })),
                more.clone(),
            );
            let (answer, _) = same_and_drafted(&stage.target, &proxy, CHAT, &body).await;
            if !stream {
                let choice = &answer["choices"][0];
                assert_eq!(choice["finish_reason"], "stop", "{answer}");
                let content: Value = choice["message"]["content"]
                    .as_str()
                    .expect("text")
                    .parse()
                    .expect("JSON");
                assert!(content["sure"].is_boolean(), "{content}");
            }

            // The call is begun already: the model would not think of it.
            let messages = json!([
                { "role": "user", "content": "What is recursion?" },
                { "role": "assistant", "content": "<tool_call>\n" },
            ]);
            let body = json!({ "messages": messages, "tools": [tool], "tool_choice": "required", "max_tokens": 80 });
            let (answer, _) = same_and_drafted(&stage.target, &proxy, CHAT, &with(body, more.clone())).await;
            if !stream {
                let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
                assert_eq!(call["name"], "count_words", "{answer}");
            }

            let grammar = r#"root ::= ("Monday" | "Tuesday" | "Friday") (", " root)?"#;
            let body = json!({ "prompt": "Monday, Tuesday, Friday, Monday, ", "n_predict": 40, "grammar": grammar });
            same_and_drafted(&stage.target, &proxy, "/completion", &with(body, more)).await;
        }
    }
}

#[tokio::test]
async fn log_probabilities_are_the_targets_own_to_the_last_digit() {
    let stage = stage().await;
    for sampling in [greedy(), sampled()] {
        let body = with(
            chat("Explain recursion.", 40),
            json!({ "logprobs": true, "top_logprobs": 3 }),
        );
        let (answer, _) = stage.same_and_drafted(CHAT, &with(body, sampling.clone())).await;
        let listed = answer["choices"][0]["logprobs"]["content"].as_array().map(Vec::len);
        assert_eq!(listed, Some(40), "{answer}");

        let body = json!({ "prompt": RAW, "n_predict": 40, "n_probs": 3, "stream": true });
        stage
            .same_and_drafted("/completion", &with(body, sampling.clone()))
            .await;

        let body = json!({ "prompt": RAW, "max_tokens": 40, "logprobs": 2 });
        stage.same_and_drafted("/v1/completions", &with(body, sampling)).await;
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_wherever_it_falls_among_the_steps() {
    let stage = stage().await;
    let body = with(chat("Explain recursion.", 80), greedy());
    let (plain, _) = stage.same_and_drafted(CHAT, &body).await;
    let text = plain["choices"][0]["message"]["content"].as_str().expect("a text");
    // Longer than a token and begun inside of one: wherever the steps end, some of these lie across.
    for (i, begin) in (60..150).step_by(13).enumerate() {
        let stop = &text[begin..begin + 9];
        let body = with(body.clone(), json!({ "stop": [stop], "stream": i % 2 == 1 }));
        let (answer, _) = stage.same_and_drafted(CHAT, &body).await;
        if i % 2 == 0 {
            let choice = &answer["choices"][0];
            assert_eq!(choice["finish_reason"], "stop");
            let before = text.split(stop).next();
            assert_eq!(choice["message"]["content"].as_str(), before, "{stop:?}");
        }
    }
}

#[tokio::test]
async fn characters_that_are_split_over_tokens_arrive_whole() {
    let stage = stage().await;
    // A drafter that is right about all the rest.
    let draft = start_draft("tightwad-tiny-target-q8_0.gguf").await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;
    for text in ["\u{1f600}", "\u{65e5}\u{672c}\u{8a9e}", "\u{1f389}"] {
        let tokens = stage.target.tokenize(text).await.len();
        assert!(tokens > text.chars().count(), "{text} is not split");
    }
    // Between what both models would say anyway, the target is made to say these.
    let grammar = r#"root ::= "Recursion is a technique in which a function calls itself \U0001F600\u65e5\u672c\u8a9e to solve a
        smaller version of the same problem. \U0001F389\u00e9 Every recursive function needs a base case""#;
    let grammar = grammar.split_whitespace().collect::<Vec<_>>().join(" ");
    // At a higher temperature the target spells the same text in tokens that no drafter would expect.
    let sampled = json!({ "temperature": 0.2, "seed": 1234, "cache_prompt": false });
    for sampling in [greedy(), sampled] {
        for stream in [false, true] {
            let body = with(
                with(chat("Explain recursion.", 80), sampling.clone()),
                json!({ "grammar": grammar }),
            );
            let body = with(body, json!({ "stream": stream }));
            let (answer, _) = same_and_drafted(&stage.target, &proxy, CHAT, &body).await;
            if !stream {
                let content = answer["choices"][0]["message"]["content"].as_str().expect("a text");
                assert!(
                    content.contains(" itself \u{1f600}\u{65e5}\u{672c}\u{8a9e} to solve"),
                    "{content}"
                );
                assert!(
                    content.contains(" problem. \u{1f389}\u{e9} Every recursive"),
                    "{content}"
                );
            }
        }
    }
}

#[tokio::test]
async fn drafts_that_begin_and_end_inside_of_characters_are_used() {
    let stage = stage().await;
    // It knows the target's mind, since it is the same model, without what slows the target down.
    let draft = start_draft("tightwad-tiny-target-q8_0.gguf").await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;
    let prompt = "\u{65e5}\u{672c}\u{8a9e}\u{1f600}".repeat(8);
    for sampling in [greedy(), sampled()] {
        for stream in [false, true] {
            let body = json!({ "prompt": prompt, "n_predict": 60, "return_tokens": true, "stream": stream });
            same_and_drafted(&stage.target, &proxy, "/completion", &with(body, sampling.clone())).await;
        }
    }
}

#[tokio::test]
async fn a_draft_has_as_many_tokens_as_were_asked_for_wherever_that_cuts_a_character() {
    let draft = start_draft("tightwad-tiny-target-q8_0.gguf").await;
    let client = tightwad::upstream::LlamaServer::new(draft.url(), None).expect("a client");
    let drafted = async |prefix: &[i32], n: usize, at_once: bool| {
        let pieces = client.draft(prefix.to_vec(), &mut WrittenTokens::default(), n, 0, at_once);
        let tokens = |piece| match piece {
            Ok(DraftPiece::Tokens(tokens)) => tokens.into_iter().map(|(token, _)| token).collect(),
            Ok(DraftPiece::End { .. }) => Vec::new(),
            Err(error) => panic!("{error}"),
        };
        let pieces: Vec<Vec<i32>> = pieces.map(tokens).collect().await;
        pieces.concat()
    };
    let mut characters = draft.tokenize(&"\u{65e5}\u{672c}\u{8a9e}\u{1f600}".repeat(8)).await;
    // Behind the first half of one the model says a character of three tokens.
    characters.truncate(characters.len() - 2);
    let letters = draft.tokenize("Count from 1 to 30. 1, 2, 3, 4, 5, 6,").await;
    for n in 1..8 {
        let whole = drafted(&characters, n, true).await;
        assert_eq!(whole.len(), n);
        assert_eq!(drafted(&characters, n, false).await, whole);
        // Where nothing is missing nothing is asked for twice.
        let before = draft.generated().await;
        assert_eq!(drafted(&letters, n, false).await.len(), n);
        assert_eq!(draft.generated().await - before, n as u64);
    }
}

#[tokio::test]
async fn an_answer_has_as_many_tokens_as_it_may_wherever_that_cuts_a_draft() {
    // Both models say much the same to this, at length.
    const PROMPT: &str = "Write a Python class Stack.";
    let stage = stage().await;
    // What short answers are drafted for is what was learnt from longer ones.
    stage.same_and_drafted(CHAT, &with(chat(PROMPT, 120), greedy())).await;
    let mut accepted = 0;
    for max_tokens in [1, 2, 3, 5, 9, 15, 24, 33, 43] {
        for stream in [false, true] {
            let body = with(chat(PROMPT, max_tokens), greedy());
            let body = with(body, json!({ "stream": stream }));
            let (answer, record) = stage.same(CHAT, &body).await;
            assert_eq!(record.generated, u64::from(max_tokens), "{record:?}");
            accepted += record.accepted;
            if max_tokens == 1 {
                assert_eq!(record.drafted, 0, "{record:?}");
            }
            if !stream {
                assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
                assert_eq!(answer["choices"][0]["finish_reason"], "length");
            }
        }
    }
    assert!(accepted > 10, "{accepted} drafted tokens in all");
}

#[tokio::test]
async fn several_choices_are_answered_without_drafts() {
    let stage = stage().await;
    let body = with(with(chat("Explain recursion.", 40), sampled()), json!({ "n": 2 }));
    let (plain, record) = stage.same(CHAT, &body).await;
    assert_eq!(plain["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!(record.drafted, 0, "{record:?}");
}

#[tokio::test]
async fn four_clients_at_once_each_get_their_own_answer() {
    let stage = stage().await;
    // Short prompts, which come to the same however they are split.
    let mut bodies = Vec::new();
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        let sampling = if i % 3 == 0 { sampled() } else { greedy() };
        let body = with(with(chat(prompt, 60), sampling), json!({ "stream": i % 2 == 0 }));
        let plain = stage.target.post(CHAT, &body).await;
        bodies.push((body, plain));
    }
    let mut accepted = 0;
    for four in bodies.chunks(4) {
        let answers = join_all(four.iter().map(|(body, _)| stage.proxy.post(CHAT, body))).await;
        for ((body, plain), (answer, record)) in four.iter().zip(answers) {
            is_the_targets_own(body, answer, plain, &record);
            accepted += record.accepted;
        }
    }
    assert!(accepted > 10, "{accepted} drafted tokens in all");
}
