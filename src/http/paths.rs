//! The paths of the server behind: which generate, which clients may use, and in which dialect errors are written.
//!
//! A path is judged as the most lenient server may read it, so that no spelling gets past a check.

use axum::http::Method;

/// The paths on which a POST makes the target generate.
const COMPLETIONS: [&str; 10] = [
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/completions",
    "/completions",
    "/completion",
    "/v1/responses",
    "/responses",
    "/v1/messages",
    "/infill",
    "/messages",
];

/// Other paths on which a POST names a model.
const EMBEDDINGS: [&str; 7] = [
    "/v1/embeddings",
    "/embeddings",
    "/embedding",
    "/v1/rerank",
    "/rerank",
    "/v1/reranking",
    "/reranking",
];

/// Of the completions, OpenAI's chat completions.
const CHATS: [&str; 2] = ["/v1/chat/completions", "/chat/completions"];

/// Other paths that the metrics know by name.
const NAMED: [&str; 17] = [
    "/v1/models",
    "/models",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/props",
    "/slots",
    "/lora-adapters",
    "/v1/audio/transcriptions",
    "/v1/chat/completions/input_tokens",
    "/v1/messages/count_tokens",
    "/v1/responses/input_tokens",
    "/api/chat",
    "/api/generate",
    "/api/tags",
    "/v1/health",
    "/",
];

/// Path of the draft protocol.
const DRAFT: &str = "draft";

/// Paths, with `/*` everything below, that show or change other clients' requests, run programs or fetch pages on the
/// server's host, or manage its models. `None`: with any method.
static HIDDEN: [(Option<Method>, &str); 15] = [
    (None, DRAFT),
    // llama-server's resumable streams: whoever names a conversation reads its answer.
    (None, "v1/stream"),
    (None, "v1/stream/*"),
    (None, "v1/streams/*"),
    (None, "tools"),
    (None, "cors-proxy"),
    (Some(Method::POST), "props"),
    (Some(Method::POST), "lora-adapters"),
    (Some(Method::POST), "slots/*"),
    // llama-server in router mode.
    (Some(Method::POST), "models"),
    (Some(Method::POST), "models/*"),
    (Some(Method::DELETE), "models"),
    (Some(Method::DELETE), "models/*"),
    (Some(Method::GET), "models/sse"),
    (Some(Method::DELETE), "api/*"),
];

/// Ollama's own API, below this folder.
const OLLAMA: &str = "api/*";

/// Parts of [`OLLAMA`] that change what models there are.
const OLLAMA_MANAGES: [&str; 6] = [
    "api/pull",
    "api/push",
    "api/create",
    "api/copy",
    "api/delete",
    "api/blobs/*",
];

/// How errors are written for the client of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `{"error": {…}}`
    OpenAi,
    /// `{"type": "error", "error": {…}}`
    Anthropic,
}

impl Dialect {
    /// The dialect of a path's clients.
    pub(crate) fn of(path: &str) -> Self {
        match path {
            "/v1/messages" | "/messages" | "/v1/messages/count_tokens" => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }
}

/// Properties of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// Its name in the metrics: itself, or `other`.
    pub(crate) label: &'static str,
    /// Whether the server generates there.
    pub(crate) completion: bool,
    /// Whether its requests name the model that is to answer.
    pub(crate) names_model: bool,
    /// Whether its requests and answers are those of OpenAI's chat completions.
    pub(crate) chat: bool,
    /// Who may use it.
    pub(crate) access: Access,
}

impl Route {
    /// Classifies a path as the server will see it: servers decode a path before they compare it.
    pub(crate) fn of(method: &Method, path: &str) -> Self {
        let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
        if let Some(label) = COMPLETIONS.into_iter().find(|it| *it == decoded) {
            return Self {
                label,
                completion: method == Method::POST,
                names_model: method == Method::POST,
                chat: CHATS.contains(&label),
                access: Access::Open,
            };
        }
        let embeddings = EMBEDDINGS.into_iter().find(|it| *it == decoded);
        let named = || NAMED.into_iter().find(|it| *it == decoded);
        let label = embeddings.or_else(named).unwrap_or("other");
        Self {
            label,
            completion: false,
            names_model: embeddings.is_some() && method == Method::POST,
            chat: false,
            access: Access::of(method, path),
        }
    }
}

/// Who may use a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Every client.
    Open,
    /// Drafters only: the draft protocol.
    Draft,
    /// The owner of the server only.
    Owners,
    /// Ollama's API, which only a target that is Ollama has.
    Ollama,
}

impl Access {
    fn of(method: &Method, path: &str) -> Self {
        let path = normalized(path);
        let below = |pattern: &str| match pattern.strip_suffix('*') {
            Some(folder) => path.starts_with(folder),
            None => path == pattern,
        };
        if path == DRAFT {
            return Self::Draft;
        }
        let hidden = HIDDEN
            .iter()
            .any(|(only, pattern)| only.as_ref().is_none_or(|only| only == method) && below(pattern));
        if hidden || OLLAMA_MANAGES.into_iter().any(below) {
            Self::Owners
        } else if below(OLLAMA) {
            Self::Ollama
        } else {
            Self::Open
        }
    }
}

/// A path as the most lenient server may read it: decoded, without empty segments and dots, in lower case.
fn normalized(path: &str) -> String {
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    let mut segments: Vec<&str> = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    segments.join("/").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(method: &Method, path: &str) -> Access {
        Route::of(method, path).access
    }

    #[test]
    fn draft_is_hidden_however_it_is_spelt() {
        for path in [
            "/draft",
            "//draft",
            "/draft/",
            "/%64raft",
            "/./draft",
            "/Draft",
            "/%2e/draft",
            "/%2fdraft",
            "/x/../draft",
        ] {
            assert_eq!(access(&Method::POST, path), Access::Draft, "{path}");
        }
        for path in ["/drafts", "/v1/draft", "/draft/1", "/", "/%2564raft"] {
            assert_eq!(access(&Method::POST, path), Access::Open, "{path}");
        }
    }

    #[test]
    fn what_concerns_all_clients_of_the_target_is_its_owners() {
        for (method, path) in [
            (Method::GET, "/v1/stream"),
            (Method::DELETE, "/v1/stream"),
            (Method::GET, "/v1/stream/abc"),
            (Method::POST, "/v1/streams/lookup"),
            (Method::POST, "//V1/stream%73/lookup"),
            (Method::GET, "/cors-proxy"),
            (Method::POST, "/tools"),
            (Method::POST, "/props"),
            (Method::POST, "/lora-adapters"),
            (Method::POST, "/slots/0"),
            (Method::POST, "/models/load"),
            (Method::DELETE, "/models"),
            (Method::POST, "/api/pull"),
            (Method::DELETE, "/api/delete"),
        ] {
            assert_eq!(access(&method, path), Access::Owners, "{method} {path}");
        }
        for (method, path) in [
            (Method::GET, "/props"),
            (Method::GET, "/slots"),
            (Method::GET, "/lora-adapters"),
            (Method::GET, "/models"),
            (Method::GET, "/v1/models/x"),
            (Method::POST, "/v1/audio/transcriptions"),
            (Method::POST, "/tokenize"),
        ] {
            assert_eq!(access(&method, path), Access::Open, "{method} {path}");
        }
        assert_eq!(access(&Method::POST, "/api/chat"), Access::Ollama);
    }

    #[test]
    fn only_a_post_to_a_generating_path_is_a_completion() {
        assert!(Route::of(&Method::POST, "/v1/chat/completions").completion);
        assert!(Route::of(&Method::POST, "/v1/chat/completion%73").completion);
        assert!(!Route::of(&Method::POST, "/v1/chat/completion%2573").completion);
        assert!(!Route::of(&Method::OPTIONS, "/v1/chat/completions").completion);
        assert!(!Route::of(&Method::POST, "/v1/chat/completions/input_tokens").completion);
        let embeddings = Route::of(&Method::POST, "/v1/embeddings");
        assert!(embeddings.names_model && !embeddings.completion);
        assert!(!Route::of(&Method::POST, "/tokenize").names_model);
    }

    #[test]
    fn labels_are_bounded() {
        assert_eq!(Route::of(&Method::GET, "/whatever/anybody/sends").label, "other");
    }
}
