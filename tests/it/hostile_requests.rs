//! Requests that would stop the target for everybody are refused by both fronts, and odd ones of real clients are not.

use std::time::{Duration, Instant};

use crate::harness::fake_upstream::{Act, FakeUpstream, json as answer};
use crate::harness::llama_server::{LlamaServer, answer_of, target};
use crate::harness::pool::{Pool, Setup};
use crate::harness::proxy::Proxy;
use crate::harness::worker::children;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use tightwad::config::{Backend, Secret, Upstream, VerificationMode};

const COMPLETION: &str = "/completion";
const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";

/// Deep enough for any stack.
const DEEP: usize = 106_250;

/// The paths on which llama-server reads JSON.
const PATHS: [&str; 17] = [
    COMPLETION,
    "/completions",
    "/v1/completions",
    CHAT,
    "/v1/chat/completions/input_tokens",
    "/v1/responses",
    "/v1/responses/input_tokens",
    MESSAGES,
    "/v1/messages/count_tokens",
    "/infill",
    "/embedding",
    "/v1/embeddings",
    "/rerank",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/v1/chat/completions/control",
];

fn post(url: &str, path: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
    let request = Client::new().post(format!("{url}{path}"));
    request.header("content-type", "application/json").body(body)
}

/// Sees that a front refuses what would stop the server behind it, at once, and that this still answers afterwards.
async fn refuses_what_stops_a_server(url: &str) {
    let nested = format!("{}{}", "[".repeat(DEEP), "]".repeat(DEEP));
    let objects = format!("{}1{}", r#"{"a":"#.repeat(DEEP), "}".repeat(DEEP));
    for path in PATHS {
        for (member, value) in [("messages", &nested), ("anything", &objects)] {
            let body = format!(r#"{{"prompt":"x","n_predict":1,"{member}":{value}}}"#);
            let (status, error) = answer_of(post(url, path, body)).await;
            assert_eq!(status, 400, "{path} {member}: {error}");
            assert_eq!(error["error"]["code"], "nested_too_deep", "{path}: {error}");
        }
    }
    let circle = json!({
        "allOf": [{ "$ref": "#/$defs/a" }],
        "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } },
    });
    let schema = |schema: &Value| json!({ "json_schema": schema });
    let wrapped = |schema: &Value| json!({ "response_format": { "type": "json_object", "schema": schema } });
    for more in [
        json!({ "grammar": format!("root ::= {}", "\"a\"? ".repeat(300)) }),
        json!({ "grammar": format!("root ::= {}", "\"a\"? ".repeat(3000)) }),
        json!({ "grammar": format!("root ::= \"a\" {}", "|".repeat(200_000)) }),
        json!({ "grammar": format!("root ::= {}", "(".repeat(100_000)) }),
        json!({ "grammar": format!("root ::= ({})*", ["[a-y]"; 32].join("|")) }),
        schema(&json!({ "type": "string", "pattern": format!("^({})+$", ["[a-y]"; 32].join("|")) })),
        schema(&circle),
        wrapped(&circle),
        schema(&json!({ "properties": { "%".repeat(100_000): {} }, "additionalProperties": false })),
        schema(&json!({ "enum": (0..4000).collect::<Vec<_>>() })),
        schema(&json!({ "type": "string", "pattern": format!("^{}$", "[a-y]?".repeat(40)) })),
        json!({ "dry_multiplier": 0.5, "dry_sequence_breakers": (0..1000).map(|n| n.to_string()).collect::<Vec<_>>() }),
        json!({ "dry_multiplier": 0.5, "dry_penalty_last_n": 500_000_000 }),
        json!({ "repeat_last_n": 500_000_000 }),
        json!({ "grammar": "root ::= \"a\"", "grammar_lazy": true, "grammar_triggers": [{ "type": 2, "value": "(a*)*b" }] }),
    ] {
        for (path, prompt) in [
            (COMPLETION, json!({ "prompt": "x" })),
            (CHAT, json!({ "messages": [] })),
        ] {
            let body = crate::harness::request::with(prompt, more.clone());
            let begun = Instant::now();
            let (status, error) = answer_of(post(url, path, body.to_string())).await;
            assert_eq!(status, 400, "{:.80}: {error}", more.to_string());
            assert_eq!(error["error"]["code"], "too_complex", "{error}");
            assert!(
                begun.elapsed() < Duration::from_secs(2),
                "{:?}: {error}",
                begun.elapsed()
            );
        }
    }
    let form = "--b\r\nContent-Disposition: form-data; name=\"grammar\"\r\n\r\nroot ::= x\r\n--b--\r\n";
    let request = Client::new().post(format!("{url}/v1/audio/transcriptions")).body(form);
    let (status, error) = answer_of(request.header("content-type", "multipart/form-data; boundary=b")).await;
    assert_eq!(status, 400, "{error}");
    let body = json!({ "prompt": "Once", "n_predict": 4 });
    let (status, told) = answer_of(post(url, COMPLETION, body.to_string())).await;
    assert_eq!(status, 200, "{told}");
}

#[tokio::test]
async fn no_request_through_the_proxy_stops_the_target() {
    let target = LlamaServer::start(&target(), &["-np", "1", "--jinja"]).await;
    let proxy = Proxy::start(target.url(), None).await;
    refuses_what_stops_a_server(proxy.url()).await;
}

#[tokio::test]
async fn no_request_through_the_coordinator_stops_the_pool() {
    let pool = Pool::ready(Setup::default()).await;
    refuses_what_stops_a_server(pool.url()).await;
    let (_, status) = pool.get("/v1/tightwad/status").await;
    assert_eq!(status["starts"], 1, "the server was not started again: {status}");
}

#[tokio::test]
async fn grammars_and_schemas_at_the_bounds_are_answered_soon() {
    let target = LlamaServer::start(&target(), &["-np", "1", "--jinja"]).await;
    let proxy = Proxy::start(target.url(), None).await;
    let properties: Value = (0..256)
        .map(|number| (format!("p{number}"), json!({ "type": "string", "maxLength": 20 })))
        .collect();
    let tools: Vec<Value> = (0..50)
        .map(|number| {
            let few: Value = (0..10)
                .map(|number| (format!("field_{number}"), json!({ "type": "string" })))
                .collect();
            let parameters = json!({ "type": "object", "properties": few, "required": ["field_0"] });
            json!({ "type": "function", "function": { "name": format!("tool_{number}"), "parameters": parameters } })
        })
        .collect();
    let chat = |more: Value| {
        let messages = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 8 });
        (CHAT, crate::harness::request::with(messages, more))
    };
    let text = |more: Value| {
        let prompt = json!({ "prompt": "Hello", "n_predict": 8 });
        (COMPLETION, crate::harness::request::with(prompt, more))
    };
    for (path, body) in [
        text(json!({ "grammar": format!("root ::= {}", "[a-y]? ".repeat(16)) })),
        text(json!({ "grammar": format!("root ::= {}", vec!["\"a\""; 1024].join("|")) })),
        text(json!({ "json_schema": { "type": "object", "properties": properties } })),
        text(json!({ "json_schema": { "enum": (0..512).map(|n| format!("value {n}")).collect::<Vec<_>>() } })),
        text(
            json!({ "dry_multiplier": 0.5, "dry_sequence_breakers": (0..32).map(|n| n.to_string()).collect::<Vec<_>>() }),
        ),
        chat(json!({ "tools": tools })),
        chat(json!({ "tools": tools, "tool_choice": "required" })),
    ] {
        let begun = Instant::now();
        let (status, told) = answer_of(post(proxy.url(), path, body.to_string())).await;
        assert_eq!(status, 200, "{:.100}: {told}", body.to_string());
        // Two seconds on an idle machine.
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?} {:.100}",
            begun.elapsed(),
            body.to_string()
        );
    }
}

#[tokio::test]
async fn a_hang_up_frees_the_target_whatever_the_client_calls_its_conversation() {
    let target = LlamaServer::start(&target(), &["-np", "1"]).await;
    let proxy = Proxy::start(target.url(), None).await;
    let body = json!({ "prompt": "Once", "n_predict": 1500, "stream": true, "ignore_eos": true });
    let request = post(proxy.url(), COMPLETION, body.to_string()).header("X-Conversation-Id", "mine");
    let mut stream = request.send().await.unwrap();
    stream.chunk().await.unwrap();
    drop(stream);
    let idle = crate::harness::wait::eventually(Duration::from_secs(3), || async {
        let slots = target.get("/slots").await;
        if slots[0]["is_processing"] == false {
            Ok(())
        } else {
            Err(slots)
        }
    });
    idle.await.expect("nobody is answered any more");
    let (status, _) = answer_of(Client::new().get(format!("{}/v1/stream?conv_id=mine", target.url()))).await;
    assert_eq!(status, 404, "the target has kept the answer");
}

/// Requests that show or change what belongs to all clients of a server. Only drafters may use `/draft`.
const OF_ALL_CLIENTS: [(Method, &str); 12] = [
    (Method::GET, "/v1/stream?conv_id=x"),
    (Method::GET, "/v1/stream/x"),
    (Method::DELETE, "/v1/stream?conv_id=x"),
    (Method::GET, "/v1/%73tream?conv_id=x"),
    (Method::POST, "/v1/streams/lookup"),
    (Method::POST, "/props"),
    (Method::POST, "/lora-adapters"),
    (Method::POST, "/slots/0?action=erase"),
    (Method::POST, "/tools"),
    (Method::GET, "/cors-proxy?url=http://10.0.0.1"),
    (Method::POST, "/models/load"),
    (Method::DELETE, "/models"),
];

/// The llama-server of a pool, as only the coordinator reaches it: its URL and its key.
fn server_of(pool: &Pool) -> (String, String) {
    let coordinator = pool.coordinator.as_ref().expect("a coordinator").pid();
    let server = children(coordinator).pop().expect("a llama-server");
    let words = |file: &str| {
        let bytes = std::fs::read(format!("/proc/{server}/{file}")).expect("it runs");
        let words = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        words.map(std::borrow::Cow::into_owned).collect::<Vec<_>>()
    };
    let port = words("cmdline").into_iter().skip_while(|word| word != "--port").nth(1);
    let key = words("environ")
        .into_iter()
        .find_map(|word| Some(word.strip_prefix("LLAMA_API_KEY=")?.to_owned()));
    let port = port.expect("`--port`");
    (format!("http://127.0.0.1:{port}"), key.expect("a key"))
}

#[tokio::test]
async fn a_hang_up_frees_the_pool_whatever_the_client_calls_its_conversation() {
    let pool = Pool::ready(Setup::default()).await;
    let (server, key) = server_of(&pool);
    let body = json!({ "prompt": "Once", "n_predict": 1500, "stream": true, "ignore_eos": true });
    let kept = |name: &'static str| {
        let request = Client::new().get(format!("{server}/v1/stream?conv_id={name}"));
        answer_of(request.bearer_auth(&key))
    };
    // Asked for at the server itself, an answer is kept.
    let short = crate::harness::request::with(body.clone(), json!({ "n_predict": 8 }));
    let direct = post(&server, COMPLETION, short.to_string()).header("X-Conversation-Id", "direct");
    let mut stream = direct.bearer_auth(&key).send().await.unwrap();
    stream.chunk().await.unwrap();
    drop(stream);
    assert_eq!(kept("direct").await.0, 200);

    let request = post(pool.url(), COMPLETION, body.to_string()).header("X-Conversation-Id", "mine");
    let mut stream = request.send().await.unwrap();
    stream.chunk().await.unwrap();
    drop(stream);
    let idle = crate::harness::wait::eventually(Duration::from_secs(3), || async {
        let (_, slots) = pool.get("/slots").await;
        let slots = slots.as_array().cloned().unwrap_or_default();
        let busy = slots.iter().filter(|slot| slot["is_processing"] == true).count();
        if !slots.is_empty() && busy == 0 {
            Ok(())
        } else {
            Err(slots)
        }
    });
    idle.await.expect("nobody is answered any more");
    assert_eq!(kept("mine").await.0, 404, "the server has kept the answer");
}

#[tokio::test]
async fn what_concerns_all_clients_of_the_pool_is_out_of_their_reach() {
    let pool = Pool::ready(Setup::default()).await;
    for (method, path) in OF_ALL_CLIENTS {
        let request = Client::new().request(method.clone(), format!("{}{path}", pool.url()));
        let (status, error) = answer_of(request.body("{}")).await;
        // The coordinator has a path `/models` of its own, which only lists.
        let expected = if path == "/models" { 405 } else { 404 };
        assert_eq!(
            (status, &error["error"]["type"]),
            (expected, &json!("invalid_request_error")),
            "{path}: {error}"
        );
    }
    let (status, _) = pool.get("/v1/models").await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn what_concerns_all_clients_of_the_target_is_out_of_their_reach() {
    let target = FakeUpstream::start(|_| answer("200 OK", "{}")).await;
    let proxy = Proxy::before(Upstream::at(target.url()), [], VerificationMode::None).await;
    for (method, path) in OF_ALL_CLIENTS.into_iter().chain([(Method::POST, "/draft")]) {
        let request = Client::new().request(method, format!("{}{path}", proxy.url()));
        let (status, error) = answer_of(request.body("{}")).await;
        assert_eq!(status, 404, "{path}: {error}");
    }
    let (status, error) = answer_of(post(proxy.url(), "/api/chat", "{}")).await;
    assert_eq!(status, 404, "{error}");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains(&format!("base URL {}/v1", proxy.url())), "{message}");
    let seen: Vec<String> = target.seen().into_iter().map(|seen| seen.target).collect();
    assert!(
        !seen.iter().any(|path| path.contains("api") || path.contains("draft")),
        "{seen:?}"
    );

    let ollama = Upstream {
        backend: Backend::Ollama,
        ..Upstream::at(target.url())
    };
    let proxy = Proxy::before(ollama, [], VerificationMode::None).await;
    assert_eq!(answer_of(post(proxy.url(), "/api/chat", "{}")).await.0, 200);
    assert_eq!(answer_of(post(proxy.url(), "/api/pull", "{}")).await.0, 404);
}

// A pool's drafters

/// A proxy before the pool that sends this key with its drafts.
async fn proxy_with(pool: &Pool, key: Option<&str>) -> Proxy {
    let target = Upstream {
        draft_key: key.map(Secret::new),
        ..Upstream::at(pool.url())
    };
    Proxy::before(target, [], VerificationMode::Auto).await
}

#[tokio::test]
async fn a_pool_with_a_key_for_drafts_is_drafted_for_by_those_who_know_it() {
    let pool = Pool::ready(Setup {
        coordinator: json!({ "draft_key": "for drafts" }),
        ..Setup::default()
    })
    .await;
    let patience = Duration::from_secs(10);
    let proxy = proxy_with(&pool, Some("for drafts")).await;
    let attached = |status: &Value| status["verification"] == "attached";
    proxy.shows("that it drafts", patience, attached).await;
    for wrong in [None, Some("guessed")] {
        let proxy = proxy_with(&pool, wrong).await;
        let told = |status: &Value| {
            let reason = status["reason"].as_str().unwrap_or_default();
            status["verification"] == "none" && reason.contains("proxy.target.draft_key_file")
        };
        proxy.shows("why it does not draft", patience, told).await;
    }
    let call = json!({ "key": "abc", "pos": 0 });
    let (status, error) = answer_of(pool.post("/draft", &call)).await;
    assert_eq!(
        (status, &error["error"]["code"]),
        (403, &json!("not_a_drafter")),
        "{error}"
    );
    let (status, _) = answer_of(pool.post("/draft", &call).header("x-draft-authorization", "for drafts")).await;
    assert_eq!(status, 200);
    // Nobody else's key names a completion.
    let body = json!({ "prompt": "Once", "max_tokens": 4 });
    let (status, _) = answer_of(pool.post("/v1/completions", &body).header("x-draft-key", "abc")).await;
    assert_eq!(status, 200);
    let asked = pool.post("/draft", &call).header("x-draft-authorization", "for drafts");
    assert_eq!(answer_of(asked).await.1["state"], "unknown");
}

#[tokio::test]
async fn a_pool_without_a_key_for_drafts_takes_them_from_its_own_host_alone() {
    let pool = Pool::ready(Setup::default()).await;
    let call = json!({ "key": "abc", "pos": 0 });
    assert_eq!(answer_of(pool.post("/draft", &call)).await.0, 200);
    // Somebody behind a reverse proxy on that host.
    let far = pool.post("/draft", &call).header("x-forwarded-for", "10.0.0.9");
    let (status, error) = answer_of(far).await;
    assert_eq!(status, 403, "{error}");
    let props = Client::new()
        .get(format!("{}/props", pool.url()))
        .header("x-forwarded-for", "10.0.0.9");
    let (_, props) = answer_of(props).await;
    assert!(
        props["draft_refused"]
            .as_str()
            .unwrap()
            .contains("coordinator.draft_key_file"),
        "{props}"
    );
    assert!(pool.get("/props").await.1["draft_refused"].is_null());
}

// Odd requests of real clients

#[tokio::test]
async fn a_mark_of_byte_order_and_a_whole_number_with_a_point_are_forwarded_as_they_came() {
    let target = FakeUpstream::start(|_| answer("200 OK", "{}")).await;
    let proxy = Proxy::before(Upstream::at(target.url()), [], VerificationMode::None).await;
    let body = "\u{feff}{\"messages\":[],\"max_tokens\": 5.0}";
    assert_eq!(answer_of(post(proxy.url(), CHAT, body)).await.0, 200);
    let seen = target.seen().into_iter().find(|seen| seen.target == CHAT).unwrap();
    assert_eq!(seen.body, body.as_bytes());
}

#[tokio::test]
async fn a_compressed_body_is_refused_by_its_name() {
    let target = FakeUpstream::start(|_| answer("200 OK", "{}")).await;
    let proxy = Proxy::before(Upstream::at(target.url()), [], VerificationMode::None).await;
    for path in [CHAT, "/tokenize"] {
        let request = post(proxy.url(), path, vec![0x1f, 0x8b, 8, 0]).header("content-encoding", "gzip");
        let (status, error) = answer_of(request).await;
        assert_eq!(status, 415, "{error}");
        assert!(error["error"]["message"].as_str().unwrap().contains("gzip"), "{error}");
    }
    let request = post(proxy.url(), CHAT, r#"{"messages":[]}"#).header("content-encoding", "identity");
    assert_eq!(answer_of(request).await.0, 200);
}

#[tokio::test]
async fn the_targets_own_errors_have_the_shape_of_their_path_and_name_our_key() {
    let target = LlamaServer::start(&target(), &["-np", "1", "-c", "256", "--jinja"]).await;
    let proxy = Proxy::start(target.url(), None).await;
    let long = json!({ "max_tokens": 1, "messages": [{ "role": "user", "content": "word ".repeat(2000) }] });
    for path in [MESSAGES, CHAT] {
        let (status, error) = answer_of(post(proxy.url(), path, long.to_string())).await;
        assert_eq!(status, 400, "{error}");
        assert_eq!(error["type"] == "error", path == MESSAGES, "{error}");
        assert!(
            error["error"]["message"].as_str().unwrap().contains("`ctx_size`"),
            "{error}"
        );
    }
    let (status, error) = answer_of(post(proxy.url(), MESSAGES, r#"{"max_tokens":1}"#)).await;
    assert!(status >= 400, "{error}");
    assert_eq!(error["type"], "error", "{error}");
}

#[tokio::test]
async fn a_target_that_dies_over_a_request_is_said_to_have_died_over_it() {
    let target = FakeUpstream::start(|_| vec![Act::Wait(Duration::from_millis(300)), Act::Close]).await;
    let proxy = Proxy::before(Upstream::at(target.url()), [], VerificationMode::None).await;
    let request = post(proxy.url(), CHAT, r#"{"messages":[]}"#);
    let dies = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(target);
    };
    let ((status, error), ()) = tokio::join!(answer_of(request), dies);
    assert_eq!(
        (status, &error["error"]["code"]),
        (502, &json!("target_broke_off")),
        "{error}"
    );
}
