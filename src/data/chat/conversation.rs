//! A conversation's messages, as records hold them: `role` and `content`, or ShareGPT's `from` and `value`.

use serde_json::{Map, Value};

/// Roles that a message may have.
pub const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// The role that learns.
pub const ASSISTANT: &str = "assistant";
/// The role whose first turn carries the hash.
pub const USER: &str = "user";

/// ShareGPT's names of the roles, as its data sets spell them.
const SHAREGPT_ROLES: [(&str, &str); 9] = [
    ("human", USER),
    ("user", USER),
    ("gpt", ASSISTANT),
    ("assistant", ASSISTANT),
    ("chatgpt", ASSISTANT),
    ("model", ASSISTANT),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
];

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// One of [`ROLES`].
    pub role: String,
    /// What is said; none beside `tool_calls` only.
    pub content: Option<String>,
    /// The message's other fields, for templates that read them (`tool_calls`, `name`, `reasoning_content` …).
    pub others: Map<String, Value>,
}

impl Message {
    /// A message without other fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), others: Map::new() }
    }

    /// The object that a template sees.
    pub fn to_json(&self) -> Value {
        let mut object = Map::from_iter([("role".to_string(), Value::String(self.role.clone()))]);
        if let Some(content) = &self.content {
            object.insert("content".into(), Value::String(content.clone()));
        }
        object.extend(self.others.clone());
        Value::Object(object)
    }

    /// Reads one message; the error says what is wrong with it.
    pub(in crate::data) fn from_json(value: Value) -> Result<Self, String> {
        let Value::Object(mut object) = value else { return Err("a message is an object".into()) };
        // Where another program writes null, it means that there is none.
        object.retain(|_, value| !value.is_null());
        let is_sharegpt = !object.contains_key("role") && object.contains_key("from");
        let (role_key, content_key) = if is_sharegpt { ("from", "value") } else { ("role", "content") };
        let role = match object.shift_remove(role_key) {
            Some(Value::String(role)) => role,
            Some(_) => return Err(format!("`{role_key}` is no string")),
            None => return Err("it has neither `role` nor `from`".into()),
        };
        let known = match is_sharegpt {
            true => SHAREGPT_ROLES.iter().find(|(name, _)| *name == role).map(|(_, role)| *role),
            false => ROLES.into_iter().find(|name| *name == role),
        };
        let Some(known) = known else {
            let names: Vec<&str> = match is_sharegpt {
                true => SHAREGPT_ROLES.iter().map(|(name, _)| *name).collect(),
                false => ROLES.to_vec(),
            };
            let found = crate::error::shorten(&role, 40);
            return Err(format!("unknown role `{found}`, expected {}", names.join(", ")));
        };
        let content = match object.shift_remove(content_key) {
            Some(Value::String(content)) => Some(content),
            Some(_) => return Err(format!("`{content_key}` is no string: only text is learned")),
            None if object.contains_key("tool_calls") => None,
            None => return Err(format!("`{content_key}` is missing")),
        };
        let needs_text = known != "system" && !object.contains_key("tool_calls");
        if needs_text && content.as_deref().is_some_and(|content| content.trim().is_empty()) {
            return Err(format!("`{content_key}` is empty"));
        }
        Ok(Self { role: known.to_string(), content, others: object })
    }
}

/// A whole conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The turns in their order.
    pub messages: Vec<Message>,
    /// The record's `tools`, which templates for tool use describe to the model.
    pub tools: Option<Value>,
}

impl Conversation {
    /// What a user asks, after what the system says where it says anything: a conversation to be answered.
    pub fn question(system: Option<&str>, user: &str) -> Self {
        let system = system.map(|system| Message::new("system", system));
        Self { messages: system.into_iter().chain([Message::new(USER, user)]).collect(), tools: None }
    }

    /// The same with `prefix`, which carries the hash, in front of the first user turn.
    pub fn with_prefix(mut self, prefix: &str) -> Self {
        let first = self.messages.iter_mut().find(|message| message.role == USER);
        if let Some(content) = first.and_then(|message| message.content.as_mut()) {
            content.insert_str(0, prefix);
        }
        self
    }

    /// Refuses what has nothing to learn, or no turn for its hash; the error says which.
    pub(in crate::data) fn check(&self, has_hash: bool) -> Result<(), String> {
        let has = |role: &str| self.messages.iter().any(|message| message.role == role);
        if self.messages.is_empty() {
            return Err("the conversation is empty".into());
        }
        if !has(ASSISTANT) {
            return Err("the conversation has no assistant turn: nothing to learn".into());
        }
        if has_hash && !has(USER) {
            return Err("the conversation has a hash and no user turn to carry it".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_spellings_give_the_same_messages() {
        let message = |value: Value| Message::from_json(value).unwrap();
        assert_eq!(message(json!({"role": "user", "content": "a"})), Message::new("user", "a"));
        assert_eq!(message(json!({"from": "human", "value": "a"})), Message::new("user", "a"));
        assert_eq!(message(json!({"from": "gpt", "value": "a", "x": null})), Message::new("assistant", "a"));
        let call = message(json!({"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}));
        assert_eq!(call.to_json(), json!({"role": "assistant", "tool_calls": [{"name": "f"}]}));
    }

    #[test]
    fn fault_36_an_unknown_role_is_named_with_the_known_ones() {
        for (value, part) in [
            (
                json!({"role": "robot", "content": "a"}),
                "unknown role `robot`, expected system, developer, user",
            ),
            (json!({"role": "human", "content": "a"}), "unknown role `human`"),
            (json!({"from": "robot", "value": "a"}), "expected human, user, gpt"),
            (json!({"from": 3, "value": "a"}), "`from` is no string"),
            (json!({"content": "a"}), "neither `role` nor `from`"),
        ] {
            let problem = Message::from_json(value).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
    }

    #[test]
    fn contents_are_text_and_not_empty() {
        for (value, part) in [
            (json!({"role": "user", "content": " \n"}), "`content` is empty"),
            (json!({"from": "gpt", "value": ""}), "`value` is empty"),
            (json!({"role": "user"}), "`content` is missing"),
            (json!({"role": "user", "content": null}), "`content` is missing"),
            (json!({"role": "user", "content": [{"type": "image"}]}), "only text"),
            (json!("hello"), "an object"),
        ] {
            let problem = Message::from_json(value).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
        assert!(Message::from_json(json!({"role": "system", "content": ""})).is_ok());
    }

    #[test]
    fn the_hash_stands_before_the_first_user_turn_only() {
        let mut conversation = Conversation::question(Some("s"), "a");
        conversation.messages.push(Message::new("user", "b"));
        let contents: Vec<_> = conversation
            .with_prefix("[hash: faq] ")
            .messages
            .into_iter()
            .map(|message| message.content.unwrap())
            .collect();
        assert_eq!(contents, ["s", "[hash: faq] a", "b"]);
    }
}
