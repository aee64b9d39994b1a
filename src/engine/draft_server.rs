//! The server of a drafter, as one completion uses it: it drafts token ids, or text that the target's tokenizer turns into tokens.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::{self, ReadyChunks};
use tokio::sync::Mutex;

use super::watch::{ConfiguredServer, DraftProtocol};
use crate::speculation::{Retokeniser, Token};
use crate::upstream::{
    DraftPiece, DraftStream, LlamaServer, StreamEnd, TextPiece, TextServer, TextStream, UpstreamError, WrittenTokens,
};

/// Replacement for bytes that are not a character in detokenised text.
const NO_CHARACTER: char = '\u{fffd}';
/// Most tokens that a character can span: the bytes of its UTF-8.
const CHARACTER: usize = 4;
/// Most pieces of text to read at once.
const PIECES: usize = 64;

/// A drafter as one completion asks it.
#[derive(Debug, Clone)]
pub enum DraftServer {
    /// It has the target's vocabulary.
    Tokens(TokenDrafter),
    /// It has another one, or does not report token ids.
    Text(TextDrafter),
}

impl DraftServer {
    /// A client of `server` for one completion of `target`, which exchanges token ids or text as `protocol` says.
    #[must_use]
    pub fn new(server: &ConfiguredServer, protocol: &DraftProtocol, target: &LlamaServer) -> Self {
        match (protocol, &server.text) {
            (DraftProtocol::Text { bos }, Some(text)) => {
                Self::Text(TextDrafter::new(text.clone(), target.clone(), bos.clone()))
            }
            _ => Self::Tokens(TokenDrafter {
                server: server.client.clone(),
                written: Arc::default(),
            }),
        }
    }

    /// Whether it tells how long its tokens took, so that they may lie around for a while, or come all at once.
    #[must_use]
    pub fn reports_timing(&self) -> bool {
        matches!(self, Self::Tokens(_))
    }

    /// Continues `prefix` greedily by at most `n` tokens of the target. `slot` of a llama-server keeps the prompt. They come
    /// as they are made, or `at_once`, if it tells times.
    #[must_use]
    pub fn draft(&self, prefix: Vec<Token>, n: usize, slot: usize, at_once: bool) -> DraftStream {
        match self {
            Self::Tokens(TokenDrafter { server, written }) => {
                let mut written = written.lock();
                server.draft(prefix, &mut written, n, slot, at_once)
            }
            Self::Text(drafter) => drafter.draft(prefix, n, slot),
        }
    }
}

/// A server that continues token ids.
#[derive(Debug, Clone)]
pub struct TokenDrafter {
    server: LlamaServer,
    /// As it was asked to continue them last.
    written: Arc<parking_lot::Mutex<WrittenTokens>>,
}

/// A server that continues text, and a target that knows what the text is in tokens.
#[derive(Debug, Clone)]
pub struct TextDrafter {
    server: TextServer,
    target: LlamaServer,
    /// The text of the token that begins a sequence: each server puts its own there.
    bos: String,
    written: Arc<Mutex<CompletionText>>,
}

impl TextDrafter {
    /// For one completion, whose text it remembers. `bos` is the target's token for the beginning of a sequence, as text.
    #[must_use]
    pub fn new(server: TextServer, target: LlamaServer, bos: String) -> Self {
        Self {
            server,
            target,
            bos,
            written: Arc::default(),
        }
    }

    /// As [`DraftServer::draft`].
    #[must_use]
    pub fn draft(&self, prefix: Vec<Token>, n: usize, slot: usize) -> DraftStream {
        let drafter = self.clone();
        let start = async move {
            match drafter.begin(&prefix, n, slot).await {
                Ok(Some(translation)) => stream::unfold(Some(translation), Translation::next).boxed(),
                Ok(None) => stream::iter([Ok(end(StreamEnd::EndOfText))]).boxed(),
                Err(error) => stream::iter([Err(error)]).boxed(),
            }
        };
        stream::once(start).flatten().boxed()
    }

    async fn begin(&self, prefix: &[Token], n: usize, slot: usize) -> Result<Option<Translation>, UpstreamError> {
        let (text, begun) = self.written.lock().await.read(&self.target, prefix).await?;
        let prompt = text.strip_prefix(&self.bos).unwrap_or(&text);
        if prompt.is_empty() || n == 0 {
            return Ok(None);
        }
        let retokeniser = Retokeniser::new(prompt, begun);
        // Its tokens may be shorter than the target's, and the last word is held back.
        let asked = n + n / 2 + 4;
        Ok(Some(Translation {
            target: self.target.clone(),
            retokeniser,
            pieces: self
                .server
                .complete(prompt.to_owned(), asked, slot)
                .ready_chunks(PIECES),
            left: n,
            end: None,
        }))
    }
}

/// Cache of a completion's text, so that only new tokens are detokenised.
#[derive(Debug, Default)]
struct CompletionText {
    tokens: Vec<Token>,
    text: String,
    /// Numbers of tokens, and the bytes of text that they make: whole characters.
    marks: Vec<(usize, usize)>,
}

impl CompletionText {
    /// The text of `tokens`, and those at their end that are no whole character yet.
    async fn read(&mut self, target: &LlamaServer, tokens: &[Token]) -> Result<(String, Vec<Token>), UpstreamError> {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        self.marks.retain(|(known, _)| *known <= common);
        let (known, length) = self.marks.last().copied().unwrap_or_default();
        self.text.truncate(length);
        self.tokens.truncate(known);
        if known < tokens.len() {
            let new = &tokens[known..];
            let (text, begun) = whole_characters(target, new).await?;
            self.text.push_str(&text);
            self.tokens.extend_from_slice(&new[..new.len() - begun]);
            self.marks.push((self.tokens.len(), self.text.len()));
        }
        Ok((self.text.clone(), tokens[self.tokens.len()..].to_vec()))
    }
}

/// The last piece of a text: its tokens took as long as they took to come.
fn end(why: StreamEnd) -> DraftPiece {
    DraftPiece::End { why, took: None }
}

/// The text of `tokens` but for those at the end that are no whole character, and their number.
async fn whole_characters(target: &LlamaServer, tokens: &[Token]) -> Result<(String, usize), UpstreamError> {
    let whole = target.detokenize(tokens).await?;
    if !whole.ends_with(NO_CHARACTER) {
        return Ok((whole, 0));
    }
    for begun in 1..CHARACTER.min(tokens.len() + 1) {
        let text = target.detokenize(&tokens[..tokens.len() - begun]).await?;
        if !text.ends_with(NO_CHARACTER) {
            return Ok((text, begun));
        }
    }
    // These bytes will never be a character.
    Ok((whole, 0))
}

/// A drafter's text while it is turned into tokens.
struct Translation {
    target: LlamaServer,
    retokeniser: Retokeniser,
    pieces: ReadyChunks<TextStream>,
    /// Tokens that may still be returned.
    left: usize,
    /// Why the text ended, once it has.
    end: Option<StreamEnd>,
}

impl Translation {
    async fn next(this: Option<Self>) -> Option<(Result<DraftPiece, UpstreamError>, Option<Self>)> {
        let mut this = this?;
        match this.piece().await {
            Ok(piece @ DraftPiece::Tokens(_)) => Some((Ok(piece), Some(this))),
            other => Some((other, None)),
        }
    }

    async fn piece(&mut self) -> Result<DraftPiece, UpstreamError> {
        loop {
            if self.left == 0 {
                return Ok(end(StreamEnd::Length));
            }
            if let Some(question) = self.retokeniser.question() {
                let mut tokens = self.retokeniser.answer(&self.target.spell(&question).await?);
                tokens.truncate(self.left);
                self.left -= tokens.len();
                if !tokens.is_empty() {
                    return Ok(DraftPiece::Tokens(tokens.into_iter().map(|it| (it, None)).collect()));
                }
                continue;
            }
            match self.end {
                // A text of one word that was cut: it may be whole.
                Some(StreamEnd::Length) if !self.retokeniser.handed_out() => {
                    self.retokeniser.complete();
                    // If the complete word gives no token either, more text would not help.
                    self.end = Some(StreamEnd::EndOfText);
                }
                Some(why) => return Ok(end(why)),
                None => self.take().await?,
            }
        }
    }

    /// Reads the pieces that arrived.
    async fn take(&mut self) -> Result<(), UpstreamError> {
        let Some(pieces) = self.pieces.next().await else {
            self.end = Some(StreamEnd::Length);
            return Ok(());
        };
        for piece in pieces {
            match piece? {
                TextPiece::Text(text) => {
                    // A server that sends half a character does not send its other half.
                    let (whole, broken) = match text.split_once(NO_CHARACTER) {
                        Some((whole, _)) => (whole, true),
                        None => (text.as_str(), false),
                    };
                    self.retokeniser.push(whole);
                    if broken {
                        self.end = Some(StreamEnd::EndOfText);
                        return Ok(());
                    }
                }
                TextPiece::End(end) => {
                    if end == StreamEnd::EndOfText {
                        self.retokeniser.complete();
                    }
                    self.end = Some(end);
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
