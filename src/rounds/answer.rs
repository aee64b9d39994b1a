//! Runs the rounds of one answer and streams its text.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::Map;
use tokio::sync::watch as channel;

use super::openai::{DONE, Style, Usage};
use super::text::Stops;
use super::{Action, Event, Finish, Request, Rounds};
use crate::engine::{Counts, Drafting, Endpoint, Prompt, Verifier, VerifyRequest};
use crate::http::auth::unguessable;
use crate::speculation::{StepSample, Token, TokenClass};
use crate::upstream::UpstreamError;

/// Preceding tokens that are detokenised together with a piece of text.
const BEFORE: usize = 6;

/// An answer in rounds that has not begun.
#[derive(Debug)]
pub struct Answer {
    request: Request,
    prediction: Option<String>,
    drafting: Drafting,
}

impl Answer {
    /// An answer to `request`; `prediction` is the text that the client expects.
    #[must_use]
    pub fn new(request: Request, prediction: Option<String>, drafting: Drafting) -> Self {
        Self {
            request,
            prediction,
            drafting,
        }
    }

    /// The counts of this answer, updated as it goes on.
    #[must_use]
    pub fn counts(&self) -> channel::Receiver<Counts> {
        self.drafting.counts()
    }

    /// The answer as the target would send it. `None` if the target must give it: it may parse the answer in a way that is
    /// unknown here, or an error came before the first text.
    pub async fn response(self) -> Option<reqwest::Response> {
        let streamed = self.request.streamed;
        let begun = match ResponseStream::begin(self).await {
            Ok(begun) => begun?,
            Err(error) => {
                tracing::debug!("no answer in rounds: {error}");
                return None;
            }
        };
        if streamed {
            return response("text/event-stream", reqwest::Body::wrap_stream(begun.events()));
        }
        match begun.whole().await {
            Ok(body) => response("application/json", body.into()),
            Err(error) => {
                tracing::debug!("the answer in rounds broke off: {error}");
                None
            }
        }
    }
}

fn response(content_type: &'static str, body: reqwest::Body) -> Option<reqwest::Response> {
    let response = http::Response::builder()
        .header(CONTENT_TYPE, content_type)
        .header(CACHE_CONTROL, "no-cache")
        .body(body);
    response.ok().map(reqwest::Response::from)
}

/// A piece of the answer.
enum Piece {
    Text(String),
    End(Finish),
}

/// An answer whose first text is known.
struct ResponseStream {
    style: Style,
    include_usage: bool,
    run: Run,
    /// The pieces generated before the response began.
    first: VecDeque<Piece>,
}

impl ResponseStream {
    /// Generates until there is text to send.
    async fn begin(answer: Answer) -> Result<Option<Self>, UpstreamError> {
        let Answer {
            request,
            prediction,
            drafting,
        } = answer;
        let target = Arc::clone(drafting.target());
        let Some(prompt) = target.prompt(&request.prompt).await? else {
            return Ok(None);
        };
        let prediction = match prediction {
            Some(text) => drafting.predicted(text).await,
            None => Vec::new(),
        };
        let style = Style::new(request.prompt.endpoint, prompt.model.clone());
        let is_chat = request.prompt.endpoint == Endpoint::Chat;
        let include_usage = request.include_usage;
        let mut run = Run::new(request, prompt, &prediction, drafting, target);
        let mut first = VecDeque::new();
        let mut begun = String::new();
        loop {
            let piece = run.next().await?;
            let is_end = matches!(piece, Piece::End(_));
            if let Piece::Text(text) = &piece {
                begun.push_str(text);
            }
            first.push_back(piece);
            if is_end || !begun.trim_start().is_empty() {
                break;
            }
        }
        let for_a_parser = is_chat && begun.trim_start().starts_with(['<', '[']);
        Ok((!for_a_parser).then_some(Self {
            style,
            include_usage,
            run,
            first,
        }))
    }

    async fn next(&mut self) -> Result<Piece, UpstreamError> {
        match self.first.pop_front() {
            Some(piece) => Ok(piece),
            None => self.run.next().await,
        }
    }

    async fn whole(mut self) -> Result<Bytes, UpstreamError> {
        let mut all = String::new();
        loop {
            match self.next().await? {
                Piece::Text(text) => all.push_str(&text),
                Piece::End(finish) => return Ok(self.style.whole(&all, finish, self.run.usage())),
            }
        }
    }

    /// The events of a stream. Dropping it cancels the round that runs.
    fn events(self) -> impl stream::Stream<Item = Result<Bytes, UpstreamError>> {
        let opening = self.style.opening();
        let rest = stream::unfold(Some(self), |response| async move {
            let mut response = response?;
            Some(match response.next().await {
                Ok(Piece::Text(text)) => (Ok(response.style.piece(&text)), Some(response)),
                Ok(Piece::End(finish)) => {
                    let mut last = response.style.end(finish).to_vec();
                    if response.include_usage {
                        last.extend_from_slice(&response.style.usage(response.run.usage()));
                    }
                    last.extend_from_slice(&DONE);
                    (Ok(last.into()), None)
                }
                Err(error) => (Err(error), None),
            })
        });
        futures_util::StreamExt::chain(stream::iter(opening.map(Ok)), rest)
    }
}

/// The rounds of an answer and their text.
struct Run {
    target: Arc<dyn Verifier>,
    drafting: Drafting,
    /// Names this answer to the target.
    name: String,
    sampling: Map<String, serde_json::Value>,
    rounds: Rounds,
    actions: VecDeque<Action>,
    stops: Stops,
    /// Tokens not sent yet, since their text ends inside of a character.
    unsent: Vec<Token>,
    /// Tokens of the answer up to a stop string that ended it early.
    stopped_at: Option<usize>,
    last_step: Instant,
    /// Whether the client predicted the answer; its usage then counts the prediction.
    is_predicted: bool,
}

impl Run {
    fn new(
        request: Request,
        prompt: Prompt,
        prediction: &[Token],
        drafting: Drafting,
        target: Arc<dyn Verifier>,
    ) -> Self {
        let mut run = Self {
            is_predicted: !prediction.is_empty(),
            target,
            name: unguessable(),
            sampling: request.sampling,
            rounds: Rounds::new(prompt.tokens, prediction, prompt.limit),
            actions: VecDeque::new(),
            stops: Stops::new(request.stop),
            unsent: Vec::new(),
            stopped_at: None,
            last_step: Instant::now(),
            drafting,
        };
        run.handle(Event::Begin);
        run
    }

    fn usage(&self) -> Usage {
        let counts = *self.drafting.counts().borrow();
        Usage {
            predicted: self
                .is_predicted
                .then_some((counts.accepted_prediction_tokens, counts.rejected_prediction_tokens)),
            prompt: self.rounds.n_prompt(),
            completion: self.stopped_at.unwrap_or(self.rounds.generated()),
        }
    }

    fn handle(&mut self, event: Event) {
        let context = self.drafting.verify_context();
        let actions = self.rounds.handle(event, &mut *self.drafting.policy(), &context);
        self.actions.extend(actions);
    }

    /// Runs rounds until there is text to send.
    async fn next(&mut self) -> Result<Piece, UpstreamError> {
        loop {
            // No action is left after the end.
            let Some(action) = self.actions.pop_front() else {
                return Ok(Piece::End(Finish::Stop));
            };
            match action {
                Action::Draft { drafter, n } => {
                    let drafted = self.drafting.draft(drafter, self.rounds.context(), n).await;
                    self.handle(Event::Drafted(drafted));
                }
                Action::Verify { draft, n } => self.verify(&draft, n).await?,
                Action::Emit(tokens) => {
                    if let Some(piece) = self.emit(tokens).await? {
                        return Ok(piece);
                    }
                }
                Action::Finish(finish) => {
                    let text = self.text(self.unsent.len()).await?;
                    let rest = text.trim_end_matches('\u{fffd}').to_owned();
                    self.unsent.clear();
                    let said = self.stops.push(&rest);
                    let rest = if said.stopped {
                        said.text
                    } else {
                        said.text + &self.stops.rest()
                    };
                    let finish = if said.stopped { Finish::Stop } else { finish };
                    if rest.is_empty() {
                        return Ok(Piece::End(finish));
                    }
                    self.actions.push_front(Action::Finish(finish));
                    return Ok(Piece::Text(rest));
                }
            }
        }
    }

    async fn verify(&mut self, draft: &[Token], n: usize) -> Result<(), UpstreamError> {
        let begun = Instant::now();
        let step = VerifyRequest {
            answer: &self.name,
            context: self.rounds.context(),
            draft,
            n,
            sampling: &self.sampling,
        };
        let verdict = match self.target.verify(step).await {
            Err(UpstreamError::Refused { url, status, message }) if !draft.is_empty() => {
                tracing::debug!("{url} does not take a draft: {status} {message}");
                // The target may have computed the draft and cached it under this name.
                self.name = unguessable();
                self.handle(Event::Refused);
                return Ok(());
            }
            Ok(verdict) if draft.is_empty() && verdict.next.is_empty() => {
                return Err(UpstreamError::Malformed {
                    url: self.drafting.target_url().to_owned(),
                    cause: "it generated nothing".into(),
                });
            }
            outcome => outcome?,
        };
        let is_first = self.rounds.generated() == 0;
        let steps = if draft.is_empty() { verdict.next.len() } else { 1 };
        let share = u32::try_from(steps.max(1)).unwrap_or(1);
        let duration = begun.elapsed() / share;
        let since_last = std::mem::replace(&mut self.last_step, Instant::now()).elapsed() / share;
        // The first step includes the prefill.
        if !is_first {
            self.learn(verdict.judged, verdict.accepted, steps, duration, since_last);
        }
        let (judged, accepted) = (verdict.judged as u64, verdict.accepted as u64);
        let predicted = |classes: &[TokenClass]| classes.iter().filter(|class| class.is_predicted()).count() as u64;
        let all_predicted = predicted(self.rounds.classes(verdict.judged));
        let right_predicted = predicted(self.rounds.classes(verdict.accepted));
        self.handle(Event::Verified(verdict));
        self.drafting.count(|counts| Counts {
            steps: counts.steps + steps as u64,
            drafted: counts.drafted + judged,
            accepted: counts.accepted + accepted,
            generated: self.rounds.generated() as u64,
            accepted_prediction_tokens: counts.accepted_prediction_tokens + right_predicted,
            rejected_prediction_tokens: counts.rejected_prediction_tokens + all_predicted - right_predicted,
        });
        Ok(())
    }

    fn learn(&self, judged: usize, accepted: usize, steps: usize, duration: Duration, since_last: Duration) {
        let mut policy = self.drafting.policy();
        for _ in 0..steps {
            let step = StepSample {
                drafted: judged,
                accepted,
                duration,
                since_last,
                batch: 1 + judged,
            };
            policy.record_step(&step, &[]);
        }
    }

    /// The text of the first `n` unsent tokens.
    async fn text(&self, n: usize) -> Result<String, UpstreamError> {
        if n == 0 {
            return Ok(String::new());
        }
        let context = self.rounds.context();
        let begin = context.len() - self.unsent.len();
        let before = &context[begin.saturating_sub(BEFORE)..begin];
        self.target.text(before, &self.unsent[..n]).await
    }

    async fn emit(&mut self, tokens: Vec<Token>) -> Result<Option<Piece>, UpstreamError> {
        self.unsent.extend(tokens);
        let text = self.text(self.unsent.len()).await?;
        if text.ends_with('\u{fffd}') {
            return Ok(None);
        }
        let before = self.stops.clone();
        let said = self.stops.push(&text);
        if said.stopped {
            self.stopped_at = Some(self.rounds.generated() - self.after_stop(&before).await?);
            self.actions.clear();
            self.actions.push_back(Action::Finish(Finish::Stop));
        }
        self.unsent.clear();
        Ok((!said.text.is_empty()).then_some(Piece::Text(said.text)))
    }

    /// Number of tokens generated beyond a stop string. A server that generates one by one would not generate them.
    async fn after_stop(&self, before: &Stops) -> Result<usize, UpstreamError> {
        let ended = self.rounds.generated() - (self.rounds.context().len() - self.rounds.n_prompt());
        for n in 1..self.unsent.len() {
            let mut stops = before.clone();
            if stops.push(&self.text(n).await?).stopped {
                return Ok(self.unsent.len() - n + ended);
            }
        }
        Ok(ended)
    }
}
