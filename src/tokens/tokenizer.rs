//! A model's tokenizer: text ↔ token ids, and the tokens that begin and end a text.

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::template;
use super::vocabulary::{self, Checked};
use crate::data::{ChatTemplate, read_optional_json};
use crate::error::{Error, Result};

/// The tokenizer of a model folder. Ids equal those of transformers for the same folder.
pub struct Tokenizer {
    library: tokenizers::Tokenizer,
    /// What the tokenizer itself puts in front of a text: BOS for Llama 3 and Mistral, nothing for Qwen and SmolLM2.
    text_start: Vec<u32>,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    fingerprint: String,
    chat: Option<Chat>,
}

/// How conversations become text.
pub(super) struct Chat {
    pub template: ChatTemplate,
    /// Tokens that end a turn.
    pub turn_ends: Vec<String>,
}

/// Ids of a text, and where each token ends in it.
pub(super) struct PlacedTokens {
    pub ids: Vec<u32>,
    /// Byte of the text at which each token ends.
    pub ends: Vec<usize>,
}

impl Tokenizer {
    /// The tokenizer of a model folder in the Hugging Face layout.
    ///
    /// `tokenizer.json` is checked and read. EOS is the first that there is of: `eos_token` in
    /// `tokenizer_config.json`, in `special_tokens_map.json` (as transformers' tokenizer), then the first
    /// `eos_token_id` in `generation_config.json`, in `config.json`. BOS likewise. Truncation and padding that the
    /// file asks for are off, as in transformers.
    ///
    /// # Errors
    /// Model errors: no `tokenizer.json`, a broken one, ids with gaps, an EOS that is no token.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::model("the model folder has no tokenizer.json")
                .at(folder.display().to_string())
                .hint("text needs it: save the model with its fast tokenizer; only records with `input_ids` do without"),
            _ => Error::file("read", &path, error),
        })?;
        let mut tokenizer = Self::from_bytes(&bytes, &path.display().to_string())?;
        tokenizer.eos_id = tokenizer.named_token(folder, "eos")?;
        tokenizer.bos_id = tokenizer.named_token(folder, "bos")?;
        Ok(tokenizer)
    }

    /// A tokenizer from the content of a `tokenizer.json`, without BOS and EOS; `place` names it in errors.
    pub fn from_bytes(bytes: &[u8], place: &str) -> Result<Self> {
        let refuse = |message: String| Error::model(message).at(place);
        let Checked { added_tokens, post_processor } = vocabulary::check(bytes, place)?;
        let mut library = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| refuse("not a tokenizer that can be used".into()).caused_by(error))?;
        library.with_padding(None);
        library.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        library
            .with_truncation(None)
            .map_err(|error| refuse("cannot turn truncation off".into()).caused_by(error))?;
        for added in added_tokens.iter().filter(|added| !added.content.is_empty()) {
            let id = library.token_to_id(&added.content);
            if id.map(u64::from) != added.id.as_u64() {
                return Err(refuse(format!(
                    "added token {:?} has the id {}, but stands where it is numbered {}",
                    added.content,
                    added.id,
                    id.map_or("nothing".into(), |id| id.to_string())
                ))
                .hint("added tokens follow the vocabulary in the order of their ids, without gaps"));
            }
        }
        let fingerprint = hex(&Sha256::digest(bytes));
        let text_start =
            template::text_start(&post_processor, library.get_vocab_size(true)).map_err(refuse)?;
        Ok(Self { library, text_start, bos_id: None, eos_id: None, fingerprint, chat: None })
    }

    /// Token ids of `text`. Special tokens written out in it are recognised, none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.library.encode_fast(text, false).map_err(cannot_encode)?.get_ids().to_vec())
    }

    /// Token ids of a text from its beginning: those of [`encode`](Self::encode) after the special tokens that the
    /// tokenizer puts in front (BOS for Llama 3 and Mistral), as in training scripts and servers that call the
    /// tokenizer on plain text. A text that spells them out does not get them twice; nothing is added at the end.
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        Ok([self.missing_start(&ids), &ids].concat())
    }

    /// What `ids` lack in front.
    fn missing_start(&self, ids: &[u32]) -> &[u32] {
        if ids.starts_with(&self.text_start) { &[] } else { &self.text_start }
    }

    /// Ids of `text`, each with its bytes in the text.
    pub(super) fn encode_placed(&self, text: &str) -> Result<Vec<(u32, (usize, usize))>> {
        let encoding = self.library.encode(text, false).map_err(cannot_encode)?;
        Ok(encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().copied()).collect())
    }

    pub(super) fn encode_start_placed(&self, text: &str) -> Result<PlacedTokens> {
        let encoding = self.library.encode(text, false).map_err(cannot_encode)?;
        let start = self.missing_start(encoding.get_ids());
        let ends = encoding.get_offsets().iter().map(|&(_, end)| end);
        Ok(PlacedTokens {
            ids: [start, encoding.get_ids()].concat(),
            ends: start.iter().map(|_| 0).chain(ends).collect(),
        })
    }

    /// Text of `token_ids`, without special tokens. A character that is not whole becomes U+FFFD: stream with
    /// [`TextStream`](crate::inference::TextStream).
    pub fn decode(&self, token_ids: &[u32]) -> Result<String> {
        self.library
            .decode(token_ids, true)
            .map_err(|error| Error::model("the tokenizer cannot decode").caused_by(error))
    }

    /// Text of `token_ids` with the special tokens written out.
    pub fn decode_all(&self, token_ids: &[u32]) -> Result<String> {
        self.library
            .decode(token_ids, false)
            .map_err(|error| Error::model("the tokenizer cannot decode").caused_by(error))
    }

    /// The id of a token by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// The token that ends a completion.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The token that begins a text, where the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Number of ids: they are `0 .. id_count`. The embedding may have more rows.
    pub fn id_count(&self) -> usize {
        self.library.get_vocab_size(true)
    }

    /// SHA-256 of `tokenizer.json`, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What its samples depend on besides the records.
    pub fn identity(&self) -> Value {
        let chat = self.chat.as_ref();
        json!({
            "tokenizer": self.fingerprint,
            "eos": self.eos_id,
            "chat": chat.map(|chat| json!([chat.template.identity(), chat.turn_ends])),
        })
    }

    /// The same tokenizer with a template for conversations, whose turns end with any of `eos_ids` or the tokenizer's
    /// EOS.
    pub fn with_chat_template(mut self, template: ChatTemplate, eos_ids: &[u32]) -> Self {
        let ids = eos_ids.iter().copied().chain(self.eos_id);
        let turn_ends = ids.filter_map(|id| self.library.id_to_token(id)).collect();
        self.chat = Some(Chat { template, turn_ends });
        self
    }

    /// The template for conversations, where there is one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref().map(|chat| &chat.template)
    }

    pub(super) fn chat(&self) -> Option<&Chat> {
        self.chat.as_ref()
    }

    /// The same tokenizer with another EOS.
    pub fn with_eos_id(mut self, eos_id: u32) -> Self {
        self.eos_id = Some(eos_id);
        self
    }

    /// `eos` or `bos` of a folder, by the precedence of [`Tokenizer::from_folder`].
    fn named_token(&self, folder: &Path, name: &str) -> Result<Option<u32>> {
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Some(settings) = read_optional_json(&folder.join(file))? else { continue };
            let token = &settings[format!("{name}_token")];
            // A string, or an added token as an object.
            if let Some(token) = token.as_str().or_else(|| token["content"].as_str()) {
                let id = self.token_to_id(token).ok_or_else(|| {
                    Error::model(format!("`{name}_token` {token:?} is not in the vocabulary"))
                        .at(folder.join(file).display().to_string())
                })?;
                return Ok(Some(id));
            }
        }
        for file in ["generation_config.json", "config.json"] {
            let Some(settings) = read_optional_json(&folder.join(file))? else { continue };
            let ids = &settings[format!("{name}_token_id")];
            let Some(id) = ids.as_array().map_or(Some(ids), |list| list.first()).filter(|id| !id.is_null())
            else {
                continue;
            };
            return match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) if self.library.id_to_token(id).is_some() => Ok(Some(id)),
                _ => Err(Error::model(format!("`{name}_token_id` {id} is no token's id"))
                    .at(folder.join(file).display().to_string())),
            };
        }
        Ok(None)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (ids, eos_id, bos_id) = (self.id_count(), self.eos_id, self.bos_id);
        write!(formatter, "Tokenizer {{ ids: {ids}, eos: {eos_id:?}, bos: {bos_id:?} }}")
    }
}

/// Hexadecimal digits of a hash.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn cannot_encode(error: tokenizers::Error) -> Error {
    Error::model("the tokenizer cannot encode a text").caused_by(error)
}
