//! A file's text into objects, document by document.

use k8s_openapi::api::{apps, core, discovery};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_saphyr::Spanned;
use std::sync::Arc;

use super::yaml::{self, Misfit};
use crate::object::{
    AuthorizationPolicy, DEFAULT_NAMESPACE, EndpointSlice, Gateway, Invalid, Kind, Namespace, NamespacedName,
    Node, Object, ObjectRef, PeerAuthentication, Pod, ReplicaSet, Service, ServiceEntry, WorkloadEntry,
    manifest,
};

/// What one document came to.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// An object.
    Object(Object),
    /// An object of a kind that the mesh does not read.
    Ignored,
    /// Nothing that can be taken.
    Faulty(Fault),
}

/// A document that cannot be taken.
#[derive(Debug, PartialEq)]
pub(super) struct Fault {
    /// The object, if its identity can be told.
    pub(super) object: Option<ObjectRef>,
    /// The field that is wrong.
    pub(super) field: Option<String>,
    /// What is wrong.
    pub(super) message: String,
    /// What stands for the object if it was never read: policies fail closed.
    pub(super) stand_in: Option<Object>,
}

/// An outcome and the line of the file that it belongs to.
#[derive(Debug, PartialEq)]
pub(super) struct Document {
    pub(super) line: u64,
    pub(super) outcome: Outcome,
}

/// Reads every document of a file.
pub(super) fn read_all(text: &str) -> Vec<Document> {
    split(text).into_iter().flat_map(|(before, text)| read_document(before, &text)).collect()
}

/// Cuts a stream at its `---` lines: the lines before each document, and its text. Documents without content are left out.
fn split(text: &str) -> Vec<(u64, String)> {
    let mut documents = vec![(0, String::new())];
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let bare = line.trim_end();
        if let Some(rest) = bare.strip_prefix("---").filter(|r| r.is_empty() || r.starts_with([' ', '\t'])) {
            // What follows the marker on its line keeps its column.
            documents.push((number as u64, format!("   {rest}\n")));
        } else if bare != "..."
            && let Some((_, document)) = documents.last_mut()
        {
            document.push_str(line);
        }
    }
    let has_content =
        |text: &str| text.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#'));
    documents.retain(|(_, document)| has_content(document));
    documents
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: Option<Name>,
}

#[derive(Debug, Default, Deserialize)]
struct Name {
    name: Option<String>,
    namespace: Option<String>,
}

/// What of an object's type is ours.
enum Recognised {
    Ours(Kind),
    List,
    Foreign,
    Wrong(String),
}

fn read_document(before: u64, text: &str) -> Vec<Document> {
    let at = |line: Option<u64>| before + line.unwrap_or(1);
    let faulty = |misfit: Misfit, object: Option<ObjectRef>| {
        let fault = Fault { object, field: misfit.field, message: misfit.message, stand_in: None };
        vec![Document { line: at(misfit.line), outcome: Outcome::Faulty(fault) }]
    };
    let header: Header = match yaml::read(text) {
        Ok(header) => header,
        Err(misfit) => return faulty(misfit, None),
    };
    match recognise(&header) {
        Recognised::Foreign => vec![Document { line: at(None), outcome: Outcome::Ignored }],
        Recognised::Wrong(message) => {
            let line = yaml::locate(text, "kind");
            faulty(Misfit { line, field: Some("kind".to_owned()), message }, None)
        }
        Recognised::List => match yaml::read::<List>(text) {
            Ok(list) => read_items(before, text, list),
            Err(misfit) => faulty(misfit, None),
        },
        Recognised::Ours(kind) => {
            let outcome = read_object(kind, &FromText(text));
            vec![place(outcome, kind, &header, at, text)]
        }
    }
}

#[derive(Debug, Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<Spanned<Value>>,
}

/// Faults of one list that are told with the line of their field; later ones with the line of their item, as each
/// search goes through the whole text.
const MAX_SEARCHES: usize = 10;

fn read_items(before: u64, text: &str, list: List) -> Vec<Document> {
    let mut documents = Vec::new();
    let mut searches = 0;
    for (i, Spanned { value: item, referenced, .. }) in list.items.into_iter().enumerate() {
        let start = referenced.line().max(1);
        let at = |line: Option<u64>| before + line.unwrap_or(start);
        let header = yaml::convert::<Header>(item.clone());
        let kind = header.as_ref().map(recognise);
        let mut document = match (header.as_ref(), kind) {
            (Ok(header), Ok(Recognised::Ours(kind))) => {
                place(read_object(kind, &FromValue(&item)), kind, header, at, "")
            }
            (Ok(_), Ok(Recognised::Foreign)) => Document { line: at(None), outcome: Outcome::Ignored },
            (Ok(_), Ok(Recognised::Wrong(message))) => unplaced(at(None), message),
            (Ok(_), Ok(Recognised::List)) => unplaced(at(None), "a List within a List".to_owned()),
            (Err(misfit), _) | (_, Err(misfit)) => unplaced(at(None), misfit.message.clone()),
        };
        if let Outcome::Faulty(fault) = &mut document.outcome {
            let field =
                fault.field.take().map_or_else(|| format!("items[{i}]"), |f| format!("items[{i}].{f}"));
            searches += 1;
            let found = (searches <= MAX_SEARCHES).then(|| yaml::locate(text, &field)).flatten();
            document.line = before + found.unwrap_or(start);
            fault.field = Some(field);
        }
        documents.push(document);
    }
    documents
}

fn unplaced(line: u64, message: String) -> Document {
    Document { line, outcome: Outcome::Faulty(Fault { object: None, field: None, message, stand_in: None }) }
}

/// Adds line and identity to what a document came to.
fn place(
    outcome: Result<Object, Faulty>,
    kind: Kind,
    header: &Header,
    at: impl Fn(Option<u64>) -> u64,
    text: &str,
) -> Document {
    let Faulty { misfit, stand_in } = match outcome {
        Ok(object) => return Document { line: at(None), outcome: Outcome::Object(object) },
        Err(faulty) => faulty,
    };
    let object = identity(kind, header);
    let found = || misfit.field.as_deref().and_then(|field| yaml::locate(text, field));
    let line = at(misfit.line.or_else(found));
    let fault = Fault { object, field: misfit.field, message: misfit.message, stand_in };
    Document { line, outcome: Outcome::Faulty(fault) }
}

fn identity(kind: Kind, header: &Header) -> Option<ObjectRef> {
    let metadata = header.metadata.as_ref()?;
    let name = metadata.name.as_deref().filter(|name| !name.is_empty())?;
    let namespace = match kind.is_namespaced() {
        true => metadata.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(DEFAULT_NAMESPACE),
        false => "",
    };
    Some(ObjectRef { kind, name: NamespacedName::new(namespace, name) })
}

fn recognise(header: &Header) -> Recognised {
    let (group, version) = header.api_version.split_once('/').unwrap_or(("", &header.api_version));
    if header.kind.is_empty() || header.api_version.is_empty() {
        return Recognised::Wrong("apiVersion and kind must be given".to_owned());
    }
    if group.is_empty() && header.kind.ends_with("List") {
        return Recognised::List;
    }
    let versions = versions(group);
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.as_str() == header.kind) else {
        // Misspelt, an object of ours would silently have no effect.
        let near = |kind: &Kind| {
            // Nobody means one of ours by a word much longer, and comparing takes memory.
            kind.group() == group
                && (6..64).contains(&header.kind.len())
                && strsim::damerau_levenshtein(kind.as_str(), &header.kind) <= 2
        };
        return match Kind::ALL.into_iter().find(near) {
            Some(kind) => Recognised::Wrong(format!("unknown kind {:?}, did you mean {kind}?", header.kind)),
            None => Recognised::Foreign,
        };
    };
    if kind.group() != group {
        // Others have kinds of the same name: a Service of Knative, a Gateway of Istio.
        return Recognised::Foreign;
    }
    if !versions.contains(&version) {
        let known = versions.join(", ");
        return Recognised::Wrong(format!("version {version:?} of {kind} is not read (read are: {known})"));
    }
    Recognised::Ours(kind)
}

fn versions(group: &str) -> &'static [&'static str] {
    match group {
        "security.istio.io" => &["v1", "v1beta1"],
        "networking.istio.io" => &["v1", "v1beta1", "v1alpha3"],
        "gateway.networking.k8s.io" => &["v1", "v1beta1"],
        _ => &["v1"],
    }
}

/// A document that can be read as any type, again and again.
trait Readable {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Misfit>;
}

struct FromText<'a>(&'a str);

impl Readable for FromText<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Misfit> {
        yaml::read(self.0)
    }
}

struct FromValue<'a>(&'a Value);

impl Readable for FromValue<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Misfit> {
        yaml::convert(self.0.clone())
    }
}

struct Faulty {
    misfit: Misfit,
    stand_in: Option<Object>,
}

impl From<Misfit> for Faulty {
    fn from(misfit: Misfit) -> Self {
        Faulty { misfit, stand_in: None }
    }
}

#[derive(Deserialize)]
struct MetadataOnly {
    metadata: ObjectMeta,
}

fn read_object(kind: Kind, document: &impl Readable) -> Result<Object, Faulty> {
    Ok(match kind {
        Kind::Namespace => Object::Namespace(typed::<core::v1::Namespace, Namespace>(document)?),
        Kind::Node => Object::Node(typed::<core::v1::Node, Node>(document)?),
        Kind::Pod => Object::Pod(typed::<core::v1::Pod, Pod>(document)?),
        Kind::Service => Object::Service(typed::<core::v1::Service, Service>(document)?),
        Kind::EndpointSlice => {
            Object::EndpointSlice(typed::<discovery::v1::EndpointSlice, EndpointSlice>(document)?)
        }
        Kind::ReplicaSet => Object::ReplicaSet(typed::<apps::v1::ReplicaSet, ReplicaSet>(document)?),
        Kind::ServiceAccount => Object::ServiceAccount(only_name::<core::v1::ServiceAccount>(document)?),
        Kind::Deployment => Object::Deployment(only_name::<apps::v1::Deployment>(document)?),
        Kind::AuthorizationPolicy => return read_policy(document),
        Kind::PeerAuthentication => return read_authentication(document),
        Kind::ServiceEntry => Object::ServiceEntry(typed::<manifest::ServiceEntry, ServiceEntry>(document)?),
        Kind::WorkloadEntry => {
            Object::WorkloadEntry(typed::<manifest::WorkloadEntry, WorkloadEntry>(document)?)
        }
        Kind::Gateway => Object::Gateway(typed::<manifest::Gateway, Gateway>(document)?),
    })
}

fn typed<M, T>(document: &impl Readable) -> Result<Arc<T>, Misfit>
where
    M: DeserializeOwned,
    T: TryFrom<M, Error = Invalid>,
{
    T::try_from(document.read::<M>()?).map(Arc::new).map_err(invalid)
}

/// Checks the object as a whole and takes its name.
fn only_name<M: DeserializeOwned>(document: &impl Readable) -> Result<NamespacedName, Misfit> {
    document.read::<M>()?;
    crate::object::identity(&document.read::<MetadataOnly>()?.metadata).map_err(invalid)
}

fn read_policy(document: &impl Readable) -> Result<Object, Faulty> {
    let policy = typed::<manifest::AuthorizationPolicy, AuthorizationPolicy>(document);
    policy.map(Object::AuthorizationPolicy).map_err(|misfit| {
        let loose = document.read::<Value>().ok();
        let stand_in = loose.and_then(|v| AuthorizationPolicy::unreadable(&v, misfit.message.clone()).ok());
        Faulty { misfit, stand_in: stand_in.map(Arc::new).map(Object::AuthorizationPolicy) }
    })
}

fn read_authentication(document: &impl Readable) -> Result<Object, Faulty> {
    let authentication = typed::<manifest::PeerAuthentication, PeerAuthentication>(document);
    authentication.map(Object::PeerAuthentication).map_err(|misfit| {
        let loose = document.read::<Value>().ok();
        let stand_in = loose.and_then(|v| PeerAuthentication::unreadable(&v).ok());
        Faulty { misfit, stand_in: stand_in.map(Arc::new).map(Object::PeerAuthentication) }
    })
}

fn invalid(invalid: Invalid) -> Misfit {
    Misfit { line: None, field: Some(invalid.field), message: invalid.problem }
}
